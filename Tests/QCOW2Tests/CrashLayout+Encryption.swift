import QCOW2
import Synchronization
import TestSupport

/// Images whose guest data is encrypted: a cluster that moves gets other bytes, because its place
/// in the file is a part of them.
extension CrashLayout {
    static let withEncryption: [CrashLayout] = [
        CrashLayout(clusterBits: 12, guestClusters: 64, isEncrypted: true, commitInterval: 2),
        CrashLayout(
            clusterBits: 13, refcountOrder: 0, guestClusters: 32, hasSnapshot: false,
            hasBacking: true, isEncrypted: true),
        CrashLayout(
            clusterBits: 14, guestClusters: 24, hasBacking: true, isEncrypted: true,
            isExtended: true),
    ]

    private static let passphrase = "open sesame"

    /// What opens the image.
    var passphrases: PassphraseSource {
        PassphraseSource(isEncrypted ? [Passphrase(Self.passphrase)] : [])
    }

    /// An image, and what opens it for the tests' own reader.
    struct EncryptedDisk {
        var content: (image: [UInt8], values: [UInt64])
        var cipher: ReferenceCipher
    }

    /// Made once, because no two of them have the same key.
    private static let disks = Mutex<[String: EncryptedDisk]>([:])

    var encryptedDisk: EncryptedDisk {
        Self.disks.withLock { disks in
            let disk = disks[testDescription] ?? makeEncryptedDisk()
            disks[testDescription] = disk
            return disk
        }
    }

    private func makeEncryptedDisk() -> EncryptedDisk {
        do {
            let device = RAMDisk(name: "disk.qcow2")
            try Image.create(on: device, size: UInt64(byteCount), options: encryptedOptions)
            let values = try fill(device)
            var bytes = [UInt8](repeating: 0, count: Int(try device.byteCount()))
            _ = try bytes.withUnsafeMutableBytes { try device.read(into: $0, at: 0) }
            let cipher = try bytes.withUnsafeBytes { bytes in
                let start = try ReferenceReader(bytes).encryptionArea()?.lowerBound ?? 0
                return try ReferenceCipher(
                    header: UnsafeRawBufferPointer(rebasing: bytes[start...]),
                    passphrase: Self.passphrase)
            }
            return EncryptedDisk(content: (bytes, values), cipher: cipher)
        } catch { fatalError("no encrypted image: \(error)") }
    }

    private var encryptedOptions: CreateOptions {
        var luks = LUKSOptions(passphrase: Passphrase(Self.passphrase))
        luks.milliseconds = 1
        var options = CreateOptions()
        options.encryption = luks
        options.clusterByteCount = 1 << UInt64(clusterBits)
        options.refcountBits = 1 << UInt64(refcountOrder)
        options.hasExtendedL2 = isExtended
        options.backingFile = hasBacking ? "backing.raw" : nil
        options.backingFormat = hasBacking ? "raw" : nil
        options.opensBackingFile = false
        return options
    }

    /// Writes the clusters that any layout has, and keeps them in a snapshot.
    private func fill(_ device: RAMDisk) throws -> [UInt64] {
        let image = try Image.open(
            device, backing: backing(), options: OpenOptions(passphrases: passphrases))
        var values = [UInt64](repeating: hasBacking ? Self.backed : 0, count: sectorCount)
        for cluster in 0..<guestClusters where [0, 5, 6, 7].contains(cluster % 8) {
            let sectors = cluster * sectorsPerCluster..<(cluster + 1) * sectorsPerCluster
            let isZero = cluster % 8 > 5
            let value = isZero ? 0 : Self.stored
            for sector in sectors { values[sector] = value }
            try image.write(
                SectorPattern.bytes(sectors: sectors, value: Self.stored),
                at: sectors.lowerBound * 512)
            if isZero {
                let range = UInt64(sectors.lowerBound * 512)..<UInt64(sectors.upperBound * 512)
                try image.writeZeroes(range, keepingSpace: cluster % 8 == 7)
            }
        }
        if hasSnapshot { try image.createSnapshot("kept") }
        try image.close()
        return values
    }
}
