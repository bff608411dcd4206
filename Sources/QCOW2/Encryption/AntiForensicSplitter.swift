/// Spreads a key over many stripes, all of which it takes to get it back: who destroys one has
/// destroyed the key (LUKS On-Disk Format Specification 1.2.3, section 2.4).
struct AntiForensicSplitter: ~Copyable {
    private let digest: Digest
    private let stripeCount: Int

    init(_ hash: HashAlgorithm, stripeCount: UInt32) throws(EncryptionError) {
        digest = try Digest(hash)
        self.stripeCount = Int(stripeCount)
    }

    /// The key that `stripes` hold.
    func merge(
        _ stripes: UnsafeRawBufferPointer, keyByteCount: Int
    ) throws(EncryptionError) -> SecretBytes {
        try SecretBytes(count: keyByteCount) { key throws(EncryptionError) in
            try gather(stripes, into: key)
            Self.add(Self.stripe(stripeCount - 1, of: stripes, key.count), to: key)
        }
    }

    /// Fills `stripes` with random bytes, and the last one so that `merge` finds `key`.
    func split(
        _ key: UnsafeRawBufferPointer, into stripes: UnsafeMutableRawBufferPointer
    ) throws(EncryptionError) {
        let start = (stripeCount - 1) * key.count
        try RandomBytes.fill(UnsafeMutableRawBufferPointer(rebasing: stripes[..<start]))
        let last = UnsafeMutableRawBufferPointer(
            rebasing: stripes[start..<start + key.count])
        try gather(UnsafeRawBufferPointer(stripes), into: last)
        Self.add(key, to: last)
    }

    /// Adds all stripes but the last one up, diffusing after each.
    private func gather(
        _ stripes: UnsafeRawBufferPointer, into sum: UnsafeMutableRawBufferPointer
    ) throws(EncryptionError) {
        sum.initializeMemory(as: UInt8.self, repeating: 0)
        for index in 0..<stripeCount - 1 {
            Self.add(Self.stripe(index, of: stripes, sum.count), to: sum)
            try diffuse(sum)
        }
    }

    /// Replaces each piece as long as a digest by the hash of its number and itself.
    private func diffuse(_ block: UnsafeMutableRawBufferPointer) throws(EncryptionError) {
        var hash: (UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64) =
            (0, 0, 0, 0, 0, 0, 0, 0)
        try withUnsafeMutableBytes(of: &hash) { hash throws(EncryptionError) in
            defer { hash.wipe() }
            let step = digest.algorithm.byteCount
            for (index, start) in stride(from: 0, to: block.count, by: step).enumerated() {
                let piece = UnsafeMutableRawBufferPointer(
                    rebasing: block[start..<min(start + step, block.count)])
                var number = UInt32(truncatingIfNeeded: index).bigEndian
                try withUnsafeBytes(of: &number) { number throws(EncryptionError) in
                    try digest.hash(number, UnsafeRawBufferPointer(piece), into: hash)
                }
                piece.copyMemory(from: UnsafeRawBufferPointer(rebasing: hash[..<piece.count]))
            }
        }
    }

    private static func stripe(
        _ index: Int, of stripes: UnsafeRawBufferPointer, _ byteCount: Int
    ) -> UnsafeRawBufferPointer {
        UnsafeRawBufferPointer(rebasing: stripes[index * byteCount..<(index + 1) * byteCount])
    }

    private static func add(
        _ bytes: UnsafeRawBufferPointer, to sum: UnsafeMutableRawBufferPointer
    ) {
        for index in 0..<sum.count { sum[index] ^= bytes[index] }
    }
}
