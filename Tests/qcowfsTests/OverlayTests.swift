import Foundation
import TestSupport
import Testing

/// `mount --overlay`: writes go elsewhere, and what was encrypted is encrypted there too.
@Suite("Overlays", .serialized, .enabledWhereMountable)
struct OverlayTests {
    private let folder: TemporaryDirectory
    private let image: EncryptedImage
    private let passphraseFile: String
    private static let secret = Array("what nobody else shall read".utf8)

    init() throws {
        folder = try TemporaryDirectory()
        image = EncryptedImage(folder.file("disk.qcow2"))
        passphraseFile = try folder.write(Array("open sesame\n".utf8), to: "passphrase")
        try image.create(size: 4.MiB)
    }

    private func mount(_ overlay: String) throws -> TestMount {
        try TestMount(
            image.path, in: folder,
            options: ["--overlay", overlay, "--passphrase-file", passphraseFile])
    }

    private func write(_ mount: TestMount) throws {
        let file = try mount.open()
        try file.write(Self.secret, at: 70_000)
        try file.sync()
        #expect(try file.read(70_000..<70_000 + Self.secret.count) == Self.secret)
    }

    @Test("A file is the overlay of one image, and temporary ones are made for each")
    func several() throws {
        let overlay = folder.file("overlay.qcow2")
        let images = [folder.file("a.qcow2"), folder.file("b.qcow2")]
        for image in images { try makeImage(image) }
        let mountpoint = try folder.directory("mnt")
        expectRefusal(
            try qcowfs("mount", "--overlay", overlay, images[0], images[1], mountpoint),
            naming: "--overlay", "one image", "tmp")
        #expect(!FileManager.default.fileExists(atPath: overlay))
        let mounted = try TestMount(images, on: mountpoint, options: ["--overlay", "tmp"])
        #expect(try holds(mounted.open(), 0..<4096, 0xA1))
    }

    @Test("An overlay over an encrypted image is encrypted with its passphrase")
    func encrypted() throws {
        let overlay = folder.file("overlay.qcow2")
        let before = try Data(contentsOf: URL(fileURLWithPath: image.path))
        let mounted = try mount(overlay)
        try write(mounted)
        try mounted.unmount()
        #expect(try Data(contentsOf: URL(fileURLWithPath: image.path)) == before)
        let stored = try Data(contentsOf: URL(fileURLWithPath: overlay))
        #expect(stored.range(of: Data(Self.secret)) == nil)
        #expect(try qcowfs("info", overlay).output.contains("luks"))
        // The same passphrase opens both.
        let again = try TestMount(
            overlay, in: folder, options: ["--read-only", "--passphrase-file", passphraseFile])
        let file = try again.open(O_RDONLY)
        #expect(try file.read(70_000..<70_000 + Self.secret.count) == Self.secret)
        #expect(try file.read(0..<70_000).allSatisfy { $0 == 0 })
    }

    @Test("A temporary one is encrypted too, with a passphrase that nobody knows")
    func temporary() throws {
        let mounted = try mount("tmp")
        try write(mounted)
        let descriptors = "/proc/\(try mounted.daemon())/fd"
        let overlay = try FileManager.default.contentsOfDirectory(atPath: descriptors)
            .map { descriptors + "/" + $0 }
            .first {
                let target = try? FileManager.default.destinationOfSymbolicLink(atPath: $0)
                return target?.contains("overlay.qcow2") == true
            }
        let stored = try Data(contentsOf: URL(fileURLWithPath: try #require(overlay)))
        #expect(stored.count > 1.MiB && stored.range(of: Data(Self.secret)) == nil)
    }

    @Test("Without the passphrase there is no overlay, and none is left")
    func refused() throws {
        let overlay = folder.file("overlay.qcow2")
        try expectMountRefused(
            image.path, in: folder, options: ["--overlay", overlay],
            naming: ["disk.qcow2", "--passphrase-file"])
        let wrong = try folder.write(Array("sesame".utf8), to: "wrong")
        try expectMountRefused(
            image.path, in: folder,
            options: ["--overlay", overlay, "--passphrase-file", wrong],
            naming: ["disk.qcow2", "passphrase is wrong"])
        #expect(access(overlay, F_OK) != 0)
    }
}
