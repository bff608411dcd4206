/// Writing compressed clusters, packed as QEMU packs them.
extension Image {
    /// Stores the cluster at `offset` as `stream`, which inflates to it.
    ///
    /// What the cluster had before loses its reference.  A stream is written to once, and its
    /// cluster is written anew, uncompressed, when its bytes change.
    /// - Parameters:
    ///   - stream: 1 byte to one less than a cluster.
    ///   - offset: A multiple of the cluster size, inside of the disk.
    /// - Throws: `.invalidArgument` for an image that cannot have compressed clusters; what `write`
    ///   throws.
    package func writeStream(
        _ stream: UnsafeRawBufferPointer, at offset: UInt64
    ) throws(ImageError) {
        let writing = try writer()
        try checkCompressible()
        guard offset & map.clusterMask == 0, offset < size, !stream.isEmpty,
            UInt64(stream.count) <= map.clusterMask
        else {
            throw ImageError(
                .invalidArgument("\(offset) is no place for a compressed cluster"),
                file: top.file.name)
        }
        try begin(writing)
        writing.bitmaps.tracker.record(offset, min(clusterByteCount, size &- offset))
        try writing.commit.relieve()
        do throws(ImageError) {
            try storeStream(stream, at: offset, writing)
        } catch  where error.isNoSpace {
            // What was dropped since the last commit still takes space.
            try writing.commit.now()
            try storeStream(stream, at: offset, writing)
        }
    }

    /// Throws where clusters must not be compressed: their bytes would be readable in an encrypted
    /// image, and have no place in an external data file.
    package func checkCompressible() throws(ImageError) {
        let words =
            header.encryptionMethod != 0
            ? "compressed clusters would not be encrypted"
            : header.incompatibleFeatures.contains(.externalDataFile)
                ? "an image with an external data file has no compressed clusters" : nil
        if let words { throw ImageError(.invalidArgument(words), file: top.file.name) }
    }

    private func storeStream(
        _ stream: UnsafeRawBufferPointer, at offset: UInt64, _ writing: Writing
    ) throws(ImageError) {
        let held = ranges.lockExclusive(offset, clusterByteCount)
        defer { ranges.unlock(held) }
        _ = try extentToChange(at: offset, limit: 1, writing)
        try makeTableWritable(at: offset, writing)
        let host = try allocateStream(stream.count, writing)
        do throws(ImageError) {
            guard
                let entry = L2Entry(
                    compressedStreamAt: host, stream.count, clusterBits: header.clusterBits)
            else {
                throw ImageError(
                    .system(.noSpace, operation: "no offsets are left for compressed clusters"),
                    file: top.file.name)
            }
            // Exactly the new bytes: others' streams lie in the same sectors.
            try top.file.write(stream, at: host)
            // Another stream may have been there, before its cluster was freed.
            decompressed.forget(layer: 0, hostRange: host..<host &+ UInt64(stream.count))
            try link(offset &>> map.clusterBits, count: 1, writing) { _, _ in entry }
        } catch {
            try writing.allocator.releaseStream(at: host, stream.count)
            throw error
        }
    }

    /// Takes room for a stream, waiting for commits where there is none now.
    private func allocateStream(
        _ byteCount: Int, _ writing: Writing
    ) throws(ImageError) -> UInt64 {
        for _ in 0..<4 {
            do throws(ImageError) {
                if let host = try writing.allocator.allocateStream(byteCount) { return host }
            } catch {
                guard case .corrupt = error.kind else { throw error }
                throw stopWriting(error, writing)
            }
            try writing.commit.now()
        }
        throw ImageError(.system(.noSpace, operation: "no free clusters"), file: top.file.name)
    }
}
