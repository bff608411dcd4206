import QCOW2
import Synchronization
import TestSupport

/// The snapshots that a client knows of, and names for more.
final class CrashNames: Sendable {
    private struct State {
        var names: [String]
        var next = 0
        /// What a snapshot showed its first reader.
        var content: [String: [UInt8]] = [:]
    }

    private let prefix: String
    private let state: Mutex<State>

    init(_ layout: CrashLayout, _ image: Image, seed: UInt64) {
        prefix = String(seed & 0xFFFF, radix: 36)
        state = Mutex(State(names: ((try? image.snapshots()) ?? []).map(\.name)))
    }

    var count: Int { state.withLock { $0.names.count } }

    func new() -> String {
        state.withLock { state in
            state.next += 1
            return "\(prefix).\(state.next)"
        }
    }

    func add(_ name: String) { state.withLock { $0.names.append(name) } }
    func remove(_ name: String) { state.withLock { $0.names.removeAll { $0 == name } } }

    func any(_ random: inout RepeatableRandom) -> String? {
        let number = random.number(below: 1 << 20)
        return state.withLock { $0.names.isEmpty ? nil : $0.names[number % $0.names.count] }
    }

    /// Whether a snapshot shows what it showed at first.
    func shows(_ name: String, _ bytes: [UInt8]) -> Bool {
        state.withLock { state in
            let first = state.content[name] ?? bytes
            state.content[name] = first
            return first == bytes
        }
    }
}

/// What changes the structure of an image, mostly beside clients that go on.
extension CrashClients {
    func change(_ random: inout RepeatableRandom, _ names: CrashNames) throws {
        switch random.number(below: 16) {
        case 0..<4 where names.count < 3: try create(names)
        case 4..<6: if let name = names.any(&random) { try delete(name, names) }
        case 6..<8: if let name = names.any(&random) { try apply(name) }
        case 8..<11: try grow(&random)
        case 11..<13: try shrink(&random)
        case 13: _ = try ZeroReclaim.run(on: image)
        case 14: if let name = names.any(&random) { try read(name, names) }
        default: try steps.flush(image)
        }
    }

    private func create(_ names: CrashNames) throws {
        let name = names.new()
        let isMade = try steps.change(.create(name)) {
            try image.createSnapshot(name, at: Image.Moment(seconds: 1, nanoseconds: 0))
        }
        if isMade { names.add(name) }
    }

    private func delete(_ name: String, _ names: CrashNames) throws {
        if try steps.change(.delete(name), { try image.deleteSnapshot(name) }) {
            names.remove(name)
        }
    }

    /// What clients write meanwhile would be lost or not.
    private func apply(_ name: String) throws {
        try stopping { try steps.change(.apply(name)) { try image.applySnapshot(name) } }
    }

    private func read(_ name: String, _ names: CrashNames) throws {
        let view = try image.openSnapshot(name)
        let bytes = try view.bytes(0..<Int(view.size))
        try view.close()
        guard names.shows(name, bytes) else {
            throw CrashWorkload.WrongRead(description: "snapshot \(name) has changed")
        }
    }

    private func grow(_ random: inout RepeatableRandom) throws {
        guard !layout.hasDataFile else { return }
        let old = Int(image.size / 512)
        let new = old + 1 + random.number(below: layout.sectorCount / 3 + 1)
        guard new < layout.sectorCount * 2 else { return }
        let isDone = try steps.change(.resize(sectorCount: new)) {
            try image.resize(to: UInt64(new * 512))
        }
        if isDone { grow(to: new) }
    }

    private func shrink(_ random: inout RepeatableRandom) throws {
        guard !layout.hasDataFile else { return }
        try stopping {
            let old = Int(image.size / 512)
            let new = max(layout.sectorCount / 4, old - 1 - random.number(below: old / 2))
            guard new < old else { return }
            try steps.change(.resize(sectorCount: new)) {
                try image.resize(to: UInt64(new * 512), shrinking: true)
            }
        }
    }
}
