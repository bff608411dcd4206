package import Glibc

/// Reading: a look-up in the layers from the top down, then one transfer per run.
extension Image {
    /// Fills `buffer` with the guest bytes from `offset` on.
    /// - Throws: `.invalidArgument` outside of the disk; `.corrupt` for bytes whose entry or
    ///   stream cannot be obeyed (EIO to a client); `.system` for what the device said.
    public func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(ImageError) {
        try checkRange(offset, UInt64(buffer.count))
        var done = 0
        while done < buffer.count {
            let start = offset &+ UInt64(done)
            let count = min(buffer.count - done, Int(ranges.groupEnd(of: start) &- start))
            let held = ranges.lockShared(start, UInt64(count))
            defer { ranges.unlock(held) }
            try readLocked(
                into: UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + count]),
                at: start)
            done += count
        }
    }

    /// The guest bytes from `offset` on, `count` of them.
    /// - Throws: What `read(into:at:)` throws.
    public func read(at offset: UInt64, count: Int) throws(ImageError) -> [UInt8] {
        try checkRange(offset, UInt64(count))
        var failure: ImageError?
        let bytes = [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
            do throws(ImageError) {
                try read(into: UnsafeMutableRawBufferPointer(buffer), at: offset)
            } catch {
                failure = error
            }
            initialized = count
        }
        if let failure { throw failure }
        return bytes
    }

    /// Where a run of guest bytes is: in which layer, and how.
    struct Source {
        let layer: Int
        let extent: Extent
    }

    /// The longest run from `offset` on, at most `limit` bytes, that has one source.  Bytes that
    /// no layer has are `.unallocated` of the last layer asked, and read as zeros.
    @inline(__always)
    func locate(_ offset: UInt64, limit: UInt64, from first: Int = 0) throws(ImageError) -> Source {
        var limit = limit
        var index = first
        while true {
            let extent = try layers[index].extent(at: offset, limit: limit)
            if extent.kind != .unallocated { return Source(layer: index, extent: extent) }
            limit = extent.byteCount
            index &+= 1
            guard index < layerCount, offset < layers[index].size else {
                // A longer layer further down does not show through a shorter one.
                return Source(layer: index &- 1, extent: Extent(.unallocated, byteCount: limit))
            }
            limit = min(limit, layers[index].size &- offset)
        }
    }

    /// Fills `buffer`; the caller holds the range lock.
    func readLocked(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, from first: Int = 0
    ) throws(ImageError) {
        var done = 0
        while done < buffer.count {
            let guest = offset &+ UInt64(done)
            let source = try locate(guest, limit: UInt64(buffer.count - done), from: first)
            let end = done &+ Int(truncatingIfNeeded: source.extent.byteCount)
            try fill(
                UnsafeMutableRawBufferPointer(rebasing: buffer[done..<end]), at: guest, from: source
            )
            done = end
        }
    }

    @inline(__always)
    private func fill(
        _ part: UnsafeMutableRawBufferPointer, at guest: UInt64, from source: Source
    ) throws(ImageError) {
        switch source.extent.kind {
        case .data:
            try layers[source.layer].read(
                into: part, at: source.extent.host, guest: guest)
        case .unallocated, .zeroPlain, .zeroAllocated:
            part.initializeMemory(as: UInt8.self, repeating: 0)
        case .compressed:
            let clusterMask = layers[source.layer].map.clusterMask
            try layers[source.layer].readCompressed(
                L2Entry(bits: source.extent.host), at: guest,
                from: Int(truncatingIfNeeded: guest & clusterMask), into: part,
                through: decompressed)
        case .corrupt:
            throw layers[source.layer].fault(source.extent, at: guest)
        }
    }

    // MARK: For a reply that gathers

    /// Reads guest bytes `offset ..< offset + count`, which must be inside of the disk and at most
    /// 1 MiB, as pieces for one gathering reply.
    ///
    /// Runs of data come from the files' mappings and zeros from a static area where that saves a
    /// copy; the rest is read or inflated into `scratch`, which has `count` bytes at least.  The
    /// guest range stays locked until `body` returns: nothing in it is freed, moved or punched.
    /// `pieces` needs 300 elements.
    package func withPieces<Result>(
        at offset: UInt64, count: Int, scratch: UnsafeMutableRawBufferPointer,
        pieces: UnsafeMutableBufferPointer<iovec>,
        _ body: (UnsafeMutableBufferPointer<iovec>) -> Result
    ) throws(ImageError) -> Result {
        try checkRange(offset, UInt64(count))
        let held = ranges.lockShared(offset, UInt64(count))
        defer { ranges.unlock(held) }
        var gathered = Pieces(pieces)
        // Below 64 KiB a copy is cheaper than the faults of a mapping; short runs of a long read
        // are copied too, so that the pieces never run out.
        let threshold = count >= 64 << 10 ? max(4096, count / 128) : .max
        var done = 0
        while done < count {
            let guest = offset &+ UInt64(done)
            let source = try locate(guest, limit: UInt64(count - done))
            let byteCount = Int(truncatingIfNeeded: source.extent.byteCount)
            let part = UnsafeMutableRawBufferPointer(rebasing: scratch[done..<done &+ byteCount])
            if byteCount >= threshold, let address = address(of: source) {
                gathered.append(address, byteCount)
            } else {
                try fill(part, at: guest, from: source)
                gathered.append(UnsafeRawPointer(part.baseAddress), byteCount)
            }
            done &+= byteCount
        }
        return body(gathered.filled)
    }

    /// Where a run can be taken from without a copy.
    @inline(__always)
    func address(of source: Source) -> UnsafeRawPointer? {
        switch source.extent.kind {
        case .data:
            layers[source.layer].address(of: source.extent.host, byteCount: source.extent.byteCount)
        case .unallocated, .zeroPlain, .zeroAllocated: zeroes
        case .compressed, .corrupt: nil
        }
    }
}

/// Pieces of a reply; neighbours in memory are one.
private struct Pieces {
    private let room: UnsafeMutableBufferPointer<iovec>
    private var count = 0

    @inline(__always)
    init(_ room: UnsafeMutableBufferPointer<iovec>) { self.room = room }

    @inline(__always)
    mutating func append(_ start: UnsafeRawPointer?, _ byteCount: Int) {
        guard let start else { return }
        if count > 0, let last = room[count &- 1].iov_base, last + room[count &- 1].iov_len == start
        {
            room[count &- 1].iov_len &+= byteCount
            return
        }
        room[count] = iovec(iov_base: UnsafeMutableRawPointer(mutating: start), iov_len: byteCount)
        count &+= 1
    }

    var filled: UnsafeMutableBufferPointer<iovec> {
        UnsafeMutableBufferPointer(rebasing: room[..<count])
    }
}
