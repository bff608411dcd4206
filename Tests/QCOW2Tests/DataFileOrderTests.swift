import QCOW2
import Synchronization
import TestSupport
import Testing

/// What reaches an image and its data file in which order, and what is left where a step fails.
@Suite("Order of a data file")
struct DataFileOrderTests {
    @Test("Trap 67: the data file is synced before entries that show it, and at every flush")
    func orderOfSyncs() throws {
        let pair = try DataFilePair(raw: false)
        let log = OrderLog()
        let image = try Image.open(
            LoggedDevice(pair.image, "image", log), dataFile: LoggedDevice(pair.data, "data", log))
        try image.write([1], at: 0)
        _ = log.take()
        try image.flush()
        let steps = log.take()
        let sync = try #require(steps.firstIndex(of: "data sync"))
        // Before the data is safe, nothing but counts and new tables; then the L2 and L1 entries.
        let published = try #require(steps.lastIndex(of: "image write"))
        #expect(sync < published && steps.last == "image sync", "\(steps)")
        #expect(steps[..<published].contains("image sync"), "\(steps)")

        // Over data that is mapped already there are no entries, and still two syncs.
        try image.write([2], at: 100)
        #expect(log.take() == ["data write"])
        try image.flush()
        #expect(log.take() == ["data sync", "image sync"])

        // A discard shows nothing, but whoever waits for it may have written elsewhere.
        try image.write([3], at: 200)
        try image.discard(0..<65536)
        _ = log.take()
        try image.flush()
        let order = log.take()
        #expect(order.first == "data sync" && order.last == "image sync", "\(order)")
        try image.close()
    }

    @Test("A sync of the data file that fails ends all writing, to either file")
    func failedSync() throws {
        let pair = try DataFilePair(raw: false)
        // The first sync is that of opening.
        let data = FaultyDevice(pair.data, FaultyDevice.Fault(.flush, call: 1))
        let image = try Image.open(pair.image, dataFile: data)
        try image.write([1], at: 0)
        let before = pair.image.bytes
        #expect(throws: ImageError.self) { try image.flush() }
        let momentCount = pair.image.moments.count
        #expect(throws: ImageError.self) { try image.write([2], at: 65536) }
        #expect(throws: ImageError.self) { try image.resize(to: image.size + 512) }
        #expect(throws: ImageError.self) { try image.flush() }
        #expect(throws: ImageError.self) { try image.close() }
        #expect(data.failed && pair.image.moments.count == momentCount)
        // No entry shows what may not be there.
        let entry = before.withUnsafeBytes { bytes in
            pair.data.bytes.withUnsafeBytes { data in
                try? ReferenceReader(bytes, dataFile: data).read(0..<512)
            }
        }
        #expect(entry?.allSatisfy { $0 == 0 } == true)
    }

    @Test("So does a failed sync of the image")
    func failedSyncOfTheImage() throws {
        let pair = try DataFilePair(raw: false)
        let file = FaultyDevice(pair.image, FaultyDevice.Fault(.flush, call: 1))
        let image = try Image.open(file, dataFile: pair.data)
        try image.write([1], at: 0)
        #expect(throws: ImageError.self) { try image.flush() }
        #expect(throws: ImageError.self) { try image.write([2], at: 0) }
        #expect(throws: ImageError.self) { try image.close() }
        #expect(pair.data.bytes[0] == 1)
    }

    @Test("A write to the data file that fails exposes nothing")
    func failedWrite() throws {
        let pair = try DataFilePair(raw: false)
        let data = FaultyDevice(
            pair.data, FaultyDevice.Fault(.write, call: 0, error: .noSpace, lasts: true))
        let image = try Image.open(pair.image, dataFile: data)
        #expect(throws: ImageError.self) { try image.write([1], at: 65536) }
        #expect(try image.bytes(65536..<65537) == [0])
        try image.close()
        #expect(try pair.entry(1) == 0)
    }
}

/// What several devices were asked for, in order.
private final class OrderLog: Sendable {
    private let steps = Mutex<[String]>([])
    func add(_ step: String) { steps.withLock { $0.append(step) } }
    func take() -> [String] {
        steps.withLock { steps in
            defer { steps = [] }
            return steps
        }
    }
}

/// A device that writes its name and what it does to a log.
private final class LoggedDevice: ForwardingDevice {
    let base: any BlockDevice
    private let word: String
    private let log: OrderLog

    init(_ base: any BlockDevice, _ word: String, _ log: OrderLog) {
        (self.base, self.word, self.log) = (base, word, log)
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        try base.write(bytes, at: offset)
        log.add("\(word) write")
    }
    func flush() throws(SystemError) {
        try base.flush()
        log.add("\(word) sync")
    }
}
