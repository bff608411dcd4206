import Glibc
import QCOW2

/// `sparse-copy SOURCE TARGET` copies the disk in a qcow2 image, without its holes, to a new image.
@main
struct SparseCopy {
    static func main() {
        let paths = CommandLine.arguments.dropFirst()
        guard let source = paths.first, let target = paths.last, paths.count == 2 else { exit(64) }
        do throws(ImageError) {
            try copy(
                from: try FileDevice(path: source, access: .readOnly),
                to: try FileDevice(creating: target))
        } catch {
            print("sparse-copy: \(error)")
            exit(1)
        }
    }

    static func copy(from source: any BlockDevice, to target: any BlockDevice) throws(ImageError) {
        let old = try Image.open(source, options: OpenOptions(access: .readOnly))
        try Image.create(on: target, size: old.size)
        let new = try Image.open(target)
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        var offset: UInt64 = 0
        while let data = try old.seekData(from: offset) {
            let hole = try old.seekHole(from: data)
            for start in stride(from: data, to: hole, by: buffer.count) {
                let part = UnsafeMutableRawBufferPointer(
                    rebasing: buffer.prefix(Int(min(hole - start, UInt64(buffer.count)))))
                try old.read(into: part, at: start)
                try new.write(UnsafeRawBufferPointer(part), at: start)
            }
            offset = hole
        }
        try new.close()
        try old.close()
    }
}
