import Glibc
import QCOW2

/// `inspect-image IMAGE` says what an image is and what is in it, from its metadata alone.
@main
struct InspectImage {
    static func main() {
        guard let path = CommandLine.arguments.dropFirst().first else { exit(64) }
        do throws(ImageError) {
            try describe(path)
            try weigh(path)
            let check = try ImageCheck(path: path) { finding in print("  \(finding)") }
            print("check: \(check.corruptionCount) errors, \(check.leakCount) leaked clusters")
        } catch {
            print("inspect-image: \(error)")
            exit(1)
        }
    }

    /// What the image says of itself; no other file is opened.
    static func describe(_ path: String) throws(ImageError) {
        let info = try ImageInfo(path: path)
        print("disk: \(info.virtualByteCount) bytes, of which the file takes", terminator: " ")
        print(info.allocatedByteCount)
        if let header = info.header {
            print("format: version \(header.version)", terminator: ", ")
            print("clusters of \(header.clusterByteCount) bytes", terminator: ", ")
            print("\(header.compressionType) where compressed")
        }
        if let backing = info.backingPath { print("backing file: \(backing)") }
        for snapshot in info.snapshots { print("snapshot \(snapshot.id): \(snapshot.name)") }
        for bitmap in info.bitmaps { print("bitmap: \(bitmap.name)") }
    }

    /// Where the disk's bytes come from.
    static func weigh(_ path: String) throws(ImageError) {
        let image = try Image.open(path, options: OpenOptions(access: .readOnly))
        var (own, backing, compressed, zero): (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
        try image.forEachMappedExtent(in: 0..<image.size) { extent in
            if extent.isZero {
                zero += extent.byteCount
            } else if extent.isCompressed {
                compressed += extent.byteCount
            } else if extent.depth > 0 {
                backing += extent.byteCount
            } else {
                own += extent.byteCount
            }
        }
        try image.close()
        print("bytes: \(own) of its own, \(compressed) compressed", terminator: ", ")
        print("\(backing) of backing files, \(zero) zeros")
    }
}
