/// An image as QEMU's tools make it, one for each thing that they can make.
package struct Fixture: Sendable, CustomStringConvertible {
    /// A part of the format that is not in every image.
    package enum Feature: Sendable, CaseIterable {
        case extendedL2, dataFile, luks, aes
    }

    package let description: String
    package var features: Set<Feature> = []
    /// Makes the image `disk.qcow2`, and what it needs besides, in a directory.
    package let make: @Sendable (Made) throws -> Void

    package init(
        _ description: String, _ features: Set<Feature> = [],
        make: @escaping @Sendable (Made) throws -> Void
    ) {
        self.description = description
        self.features = features
        self.make = make
    }

    /// A fixture in a directory of its own.
    package struct Made: Sendable {
        package let folder: TemporaryDirectory
        package var image: String { folder.file("disk.qcow2") }
        /// The file with the passphrase of encrypted images.
        package var passphraseFile: String { folder.file("passphrase") }
        fileprivate let isEncrypted: Bool
        fileprivate let isReadOnly: Bool

        package static let passphrase = "open sesame"

        /// What `qcowfs` needs to be told beside the image.
        package var openOptions: [String] {
            isEncrypted ? ["--passphrase-file", passphraseFile] : []
        }

        /// What `qcowfs mount` needs to be told.
        package var mountOptions: [String] {
            openOptions + (isReadOnly ? ["--read-only"] : [])
        }

        /// How QEMU's tools are told to open the image.
        package var source: [String] {
            guard isEncrypted else { return ["-f", "qcow2", image] }
            return QemuImg.secret(Self.passphrase) + [
                "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename=\(image)",
            ]
        }

        package func create(_ options: [String] = [], size: Int? = 4.MiB) throws {
            try QemuImg.create(image, size: size, options: options)
        }

        package func io(_ commands: String...) throws {
            guard isEncrypted else {
                _ = try QemuImg.io(image, commands)
                return
            }
            try Command.require(["qemu-io"] + commands.flatMap { ["-c", $0] } + source)
        }
    }

    package func made() throws -> Made {
        let made = Made(
            folder: try TemporaryDirectory(),
            isEncrypted: features.contains(.luks) || features.contains(.aes),
            isReadOnly: features.contains(.aes))
        _ = try made.folder.write(Array(Made.passphrase.utf8), to: "passphrase")
        try make(made)
        return made
    }
}

extension QemuImg {
    /// The words that give QEMU's tools a passphrase under the name `s`.
    package static func secret(_ passphrase: String) -> [String] {
        ["--object", "secret,id=s,data=\(passphrase)"]
    }

    /// The bytes of a fixture's disk, in the raw file `target`.
    package static func convert(_ made: Fixture.Made, to target: String) throws {
        try Command.require(
            ["qemu-img", "convert", "-q", "-O", "raw"] + made.source + [target], timeout: 600)
    }

    /// What `qemu-img map` prints of a fixture.
    package static func mapText(_ made: Fixture.Made, _ form: String = "json") throws -> String {
        try Command.require(["qemu-img", "map", "--output=\(form)"] + made.source)
    }
}
