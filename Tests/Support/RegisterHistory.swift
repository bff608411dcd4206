/// What clients did to the sectors of a disk, and when, to be judged afterwards.
///
/// Each sector is a register: it must be possible to give every operation one moment between its
/// begin and its end, so that each read returns what the write before it wrote (linearizability,
/// Herlihy and Wing).  Every value but 0 is written to a sector at most once, which makes that easy
/// to judge (Gibbons and Korach): the operations of one value span a zone, from the first end to
/// the last begin, in which the register certainly had it.
package struct RegisterHistory: Sendable {
    package struct Operation: Sendable {
        package var isWrite: Bool
        package var sector: Int
        package var value: UInt64
        /// Moments of one clock for all clients.
        package var begin: UInt64
        package var end: UInt64

        package init(isWrite: Bool, sector: Int, value: UInt64, begin: UInt64, end: UInt64) {
            (self.isWrite, self.sector, self.value) = (isWrite, sector, value)
            (self.begin, self.end) = (begin, end)
        }
    }

    private var operations: [Operation] = []

    package init() {}

    package mutating func append(_ operation: Operation) { operations.append(operation) }

    package mutating func append(contentsOf other: RegisterHistory) {
        operations += other.operations
    }

    package var operationCount: Int { operations.count }

    /// The reads, or the orders of writes, that no register could have given; a line each.
    package func faults() -> [String] {
        Dictionary(grouping: operations, by: \.sector).sorted { $0.key < $1.key }.flatMap {
            Self.faults(ofSector: $0.key, $0.value)
        }
    }

    /// All operations of one value other than 0.
    private struct Zone {
        var value: UInt64
        var write: Operation?
        var firstEnd = UInt64.max
        var lastBegin: UInt64 = 0
        /// The register had the value from the first end to the last begin.
        var isForward: Bool { firstEnd < lastBegin }
        var range: ClosedRange<UInt64> {
            min(firstEnd, lastBegin)...max(firstEnd, lastBegin)
        }

        mutating func add(_ operation: Operation) {
            if operation.isWrite { write = operation }
            firstEnd = min(firstEnd, operation.end)
            lastBegin = max(lastBegin, operation.begin)
        }
    }

    private static func faults(ofSector sector: Int, _ operations: [Operation]) -> [String] {
        var zones: [UInt64: Zone] = [:]
        for operation in operations where operation.value != 0 {
            zones[operation.value, default: Zone(value: operation.value)].add(operation)
        }
        var faults: [String] = []
        for operation in operations where operation.value != 0 && !operation.isWrite {
            let write = zones[operation.value]?.write
            if write == nil || write!.begin > operation.end {
                faults.append("sector \(sector): \(operation) returns what was not written yet")
            }
        }
        let forward = zones.values.filter(\.isForward).sorted { $0.firstEnd < $1.firstEnd }
        for (one, next) in zip(forward, forward.dropFirst()) where next.firstEnd < one.lastBegin {
            faults.append("sector \(sector): \(one.value) and \(next.value) at the same time")
        }
        // What was written within the certain time of another value ended that.
        let others =
            zones.values.filter { !$0.isForward }.map { ($0.value, $0.range) }
            + operations.filter { $0.value == 0 }.map { (0, $0.begin...$0.end) }
        for (value, range) in others {
            let around = forward.first {
                $0.firstEnd < range.lowerBound && range.upperBound < $0.lastBegin
            }
            if let around {
                faults.append("sector \(sector): \(value) at \(range) within \(around)")
            }
        }
        return faults + staleZeros(sector, operations)
    }

    /// Zeros that somebody read although every writing of zeros before was written over.
    private static func staleZeros(_ sector: Int, _ operations: [Operation]) -> [String] {
        let writes = operations.filter(\.isWrite)
        let zeros = writes.filter { $0.value == 0 }
        let values = writes.filter { $0.value != 0 }
        return operations.filter { $0.value == 0 && !$0.isWrite }.compactMap { read in
            let isRight = zeros.contains { zero in
                zero.begin < read.end
                    && !values.contains { zero.end < $0.begin && $0.end < read.begin }
            }
            return isRight ? nil : "sector \(sector): \(read) returns zeros of the past"
        }
    }
}
