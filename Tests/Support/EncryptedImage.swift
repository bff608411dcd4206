import Foundation
import Synchronization

/// Encrypted images that QEMU made, by the words that made them.
private let made = Mutex<[[String]: Data]>([:])

/// An encrypted image as QEMU's tools see it, with its passphrase.
package struct EncryptedImage: Sendable {
    package let path: String
    package var passphrase = "open sesame"
    /// Encrypted files below it, each by its place in QEMU's graph, such as `backing`.
    package var encryptedBelow: [(place: String, passphrase: String, format: String)] = []
    package var format = "luks"
    package var isEncrypted = true

    package init(_ path: String, passphrase: String = "open sesame") {
        self.path = path
        self.passphrase = passphrase
    }

    /// `--object` for each passphrase.
    package var secrets: [String] {
        (isEncrypted ? secret("top", passphrase) : [])
            + encryptedBelow.enumerated().flatMap { secret("below\($0)", $1.passphrase) }
    }

    /// What stands for the path behind `--image-opts`.
    package var options: String {
        var words = [optionsAlone]
        for (index, below) in encryptedBelow.enumerated() {
            words += [
                "\(below.place).encrypt.format=\(below.format)",
                "\(below.place).encrypt.key-secret=below\(index)",
            ]
        }
        return words.joined(separator: ",")
    }

    /// The same for a command that opens no file below.
    private var optionsAlone: String {
        "driver=qcow2,file.filename=\(path)"
            + (isEncrypted ? ",encrypt.format=\(format),encrypt.key-secret=top" : "")
    }

    private func secret(_ name: String, _ passphrase: String) -> [String] {
        ["--object", "secret,id=\(name),data=\(passphrase)"]
    }

    /// Makes the image; `encryption` as in `-o encrypt.…`.
    package func create(
        size: Int, encryption: [String] = [], options: [String] = [], backing: String? = nil,
        backingFormat: String = "qcow2"
    ) throws {
        let words = creation(
            size: size, encryption: encryption, options: options, backing: backing,
            backingFormat: backingFormat)
        // QEMU takes seconds to measure how long a key takes: of each kind one image is made.
        let kind = words.filter { $0 != path }
        let isAlone = isEncrypted && !options.contains { $0.hasPrefix("data_file=") }
        if isAlone, let bytes = made.withLock({ $0[kind] }) {
            return try bytes.write(to: URL(fileURLWithPath: path))
        }
        try Command.require(words)
        if isAlone {
            let bytes = try Data(contentsOf: URL(fileURLWithPath: path))
            made.withLock { $0[kind] = bytes }
        }
    }

    /// The words that make the image.
    package func creation(
        size: Int, encryption: [String] = [], options: [String] = [], backing: String? = nil,
        backingFormat: String = "qcow2"
    ) -> [String] {
        var all = options
        if isEncrypted {
            all += ["encrypt.format=\(format)", "encrypt.key-secret=top"]
            if format == "luks" { all.append("encrypt.iter-time=10") }
            all += encryption.map { "encrypt.\($0)" }
        }
        var words = ["qemu-img", "create", "-q", "-f", "qcow2"] + secrets
        if !all.isEmpty { words += ["-o", all.joined(separator: ",")] }
        if let backing { words += ["-u", "-b", backing, "-F", backingFormat] }
        return words + [path, "\(size)"]
    }

    @discardableResult
    package func io(_ commands: [String]) throws -> String {
        try Command.require(
            ["qemu-io"] + secrets + commands.flatMap { ["-c", $0] }
                + ["--image-opts", options])
    }

    package func check() throws -> Command.Result {
        try Command.run(["qemu-img", "check"] + secrets + ["--image-opts", options], timeout: 600)
    }

    /// The disk, or a snapshot of it, as QEMU decrypts it.
    package func disk(
        in folder: TemporaryDirectory, snapshot: String? = nil
    ) throws -> ReferenceDisk {
        let raw = folder.file("decrypted.raw")
        try Command.require(
            ["qemu-img", "convert", "-q"] + secrets + (snapshot.map { ["-l", $0] } ?? [])
                + ["--image-opts", options, "-O", "raw", raw], timeout: 600)
        return try ReferenceDisk(contentsOf: raw)
    }

    /// The ranges that are no holes, ascending, neighbours joined.
    package func dataRanges() throws -> [Range<Int>] {
        try QemuImg.dataRanges(of: secrets + ["--image-opts", options])
    }

    /// Nil where QEMU says that the image holds what the raw file holds; its words where not.
    package func difference(from raw: String) throws -> String? {
        let result = try Command.run(
            ["qemu-img", "compare"] + secrets
                + ["--image-opts", "driver=raw,file.filename=\(raw)", options], timeout: 600)
        return result.status == 0 ? nil : result.description
    }

    /// - Parameter flag: `-c`, `-a` or `-d`.
    package func snapshot(_ flag: String, _ name: String) throws {
        try Command.require(
            ["qemu-img", "snapshot", "-q"] + secrets + ["--image-opts", flag, name, options])
    }

    /// Changes a bitmap as `words`, the last one its name, tell `qemu-img bitmap`.
    package func bitmap(_ words: String...) throws {
        try Command.require(
            ["qemu-img", "bitmap"] + secrets + ["--image-opts"] + words.dropLast()
                + [optionsAlone, words[words.count - 1]])
    }

    /// Opens one more key slot.
    package func add(passphrase: String) throws {
        try Command.require(
            ["qemu-img", "amend", "-q"] + secrets
                + secret("new", passphrase)
                + [
                    "--image-opts", options, "-o",
                    "encrypt.state=active,encrypt.new-secret=new,encrypt.iter-time=10",
                ])
    }

    /// Closes the key slots that `passphrase` opens.
    package func remove(passphrase: String) throws {
        try Command.require(
            ["qemu-img", "amend", "-q"] + secrets + secret("old", passphrase)
                + [
                    "--image-opts", options, "-o",
                    "encrypt.state=inactive,encrypt.old-secret=old",
                ])
    }
}
