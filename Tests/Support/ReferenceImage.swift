internal import Glibc

/// An image file as the tests' own reader sees it, with its backing chain.
package final class ReferenceImage {
    package let path: String
    private let mapping: FileMapping
    /// Nil for a raw file.
    private let reader: ReferenceReader?
    private let backing: ReferenceImage?
    private let data: FileMapping?

    /// Opens `path` and, where it names one, its backing file.
    package init(_ path: String, isRaw: Bool = false) throws {
        self.path = path
        mapping = try FileMapping(path)
        let folder = path.split(separator: "/", omittingEmptySubsequences: false).dropLast()
            .joined(separator: "/")
        func found(_ name: String) -> String { name.hasPrefix("/") ? name : folder + "/" + name }
        data = isRaw ? nil : try Self.dataFileName(mapping.bytes).map { try FileMapping(found($0)) }
        let reader =
            isRaw
            ? nil : try ReferenceReader(mapping.bytes, dataFile: data?.bytes, owner: mapping)
        self.reader = reader
        guard let name = reader?.backingName else {
            backing = nil
            return
        }
        let format = try reader?.extensions().first { $0.type == 0xe279_2aca }?.data
        backing = try ReferenceImage(
            found(name), isRaw: format.map { String(decoding: $0, as: UTF8.self) } == "raw")
    }

    /// The external data file that the header extension names, where the feature bit is set.
    private static func dataFileName(_ bytes: UnsafeRawBufferPointer) throws -> String? {
        guard bytes.number(at: 4, as: UInt32.self) == 3,
            bytes.number(at: 72, as: UInt64.self) & 4 != 0
        else { return nil }
        let nothing = UnsafeRawBufferPointer(start: nil, count: 0)
        return try ReferenceReader(bytes, dataFile: nothing).extensions()
            .first { $0.type == 0x4441_5441 }.map { String(decoding: $0.data, as: UTF8.self) }
    }

    package var qcow2: ReferenceReader {
        get throws {
            guard let reader else { throw ReferenceReader.Fault("\(path) is a raw file") }
            return reader
        }
    }

    /// Fills `buffer` with guest bytes from `offset` on; zeros past the end of the disk.  A
    /// snapshot, which `table` maps, may be larger than the disk.
    package func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: Int,
        through table: ReferenceReader.L1Table? = nil
    ) throws(ReferenceReader.Fault) {
        let end =
            table == nil ? reader?.byteCount ?? mapping.bytes.count : offset + buffer.count
        let count = max(0, min(buffer.count, end - offset))
        let inside = UnsafeMutableRawBufferPointer(rebasing: buffer[..<count])
        UnsafeMutableRawBufferPointer(rebasing: buffer[count...]).fillZero()
        guard let reader else {
            if count > 0 {
                inside.copyMemory(
                    from: UnsafeRawBufferPointer(rebasing: mapping.bytes[offset..<offset + count]))
            }
            return
        }
        guard let backing else { return try reader.read(into: inside, at: offset, through: table) }
        try reader.read(into: inside, at: offset, through: table) {
            (position, part) throws(ReferenceReader.Fault) in
            try backing.read(into: part, at: position)
        }
    }

    /// Where the disk, or a snapshot of it, differs from `model` first; nil where it does not.
    package func firstDifference(
        from model: ReferenceDisk, through table: ReferenceReader.L1Table? = nil
    ) throws -> Int? {
        let block = UnsafeMutableRawBufferPointer.allocate(byteCount: 1.MiB, alignment: 4096)
        defer { block.deallocate() }
        for start in stride(from: 0, to: model.byteCount, by: block.count) {
            let range = start..<min(start + block.count, model.byteCount)
            let part = UnsafeMutableRawBufferPointer(rebasing: block[..<range.count])
            try read(into: part, at: start, through: table)
            if let place = model.firstDifference(in: range, from: UnsafeRawBufferPointer(part)) {
                return place
            }
        }
        return nil
    }
}

/// A file's bytes, for as long as somebody looks at them.
private final class FileMapping {
    let bytes: UnsafeRawBufferPointer

    init(_ path: String) throws {
        let file = try TestFile(path, O_RDONLY)
        let count = try file.byteCount()
        let memory = mmap(nil, max(count, 1), PROT_READ, MAP_SHARED, file.descriptor, 0)
        guard let memory, memory != MAP_FAILED else {
            throw CallError(call: "mmap \(path)", code: errno)
        }
        bytes = UnsafeRawBufferPointer(start: memory, count: count)
    }

    deinit { munmap(UnsafeMutableRawPointer(mutating: bytes.baseAddress), max(bytes.count, 1)) }
}
