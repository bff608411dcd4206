internal import ArgumentParser
internal import QCOW2

/// `qcowfs convert`: copies a disk to a new file.
struct Convert: Verb {
    static let configuration = CommandConfiguration(
        commandName: "convert",
        abstract: "Copy a disk to a new raw file or image, without its holes and its backing file.",
        discussion: """
            The target appears when it is complete; until then a file of that name stays as it is.
            """)

    @Option(name: .customShort("f"), help: "The source's format; found by its magic without.")
    var sourceFormat: DiskFormat?

    @Option(name: .customShort("O"), help: "The target's format.")
    var targetFormat = DiskFormat.raw

    @Option(
        name: [.customShort("o"), .customLong("option")],
        help: ArgumentHelp("Options of the new image, as create has them.", valueName: "OPT=VALUE"))
    var options: [String] = []

    @Flag(name: .customShort("c"), help: "Compress the clusters of the new image.")
    var compresses = false

    @Option(
        name: .customShort("l"),
        help: ArgumentHelp(
            "Copy this internal snapshot, by identifier or name.", valueName: "snapshot"))
    var snapshot: String?

    @Option(
        name: .customShort("S"),
        help: "Runs of zeros of so many bytes become holes; 0 writes them out.")
    var sparse = ByteSize(byteCount: 4096)

    @Option(name: .customShort("m"), help: "Threads that copy.")
    var threads = 0

    @OptionGroup var sources: SourceOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The disk to copy.")
    var source: String

    @Argument(help: "The file to make; one that is there is replaced.")
    var target: String

    func validate() throws {
        guard (0...256).contains(threads) else {
            throw ValidationError("-m takes a number of threads from 1 to 256")
        }
        if compresses && targetFormat == .raw {
            throw ValidationError("-c needs -O qcow2: a raw disk cannot be compressed")
        }
    }

    func perform() throws -> Int32 {
        var conversion = Conversion(to: try conversionTarget())
        conversion.sparseByteCount = sparse.byteCount
        conversion.compresses = compresses
        conversion.threadCount = threads == 0 ? Processors.count : threads
        let disk = try sources.open(source, format: sourceFormat, snapshot: snapshotWord)
        let bar = progress.report(of: "convert")
        Interruption.watch()
        do throws(ImageError) {
            try conversion.run(from: disk, toFileAt: target) {
                bar?.update($0)
                return !Interruption.hasCome
            }
        } catch {
            bar?.clear()
            guard error.kind == .cancelled else { throw error }
            throw Failure(target, "interrupted; nothing was left there, and what was there stays")
        }
        bar?.finish()
        try disk.close()
        return 0
    }

    /// `snapshot.id=1` and `snapshot.name=x` are qemu-img's long words for the same.
    private var snapshotWord: String? {
        snapshot.map { word in
            for prefix in ["snapshot.id=", "snapshot.name="] where word.hasPrefix(prefix) {
                return String(word.dropFirst(prefix.count))
            }
            return word
        }
    }

    private func conversionTarget() throws -> Conversion.Target {
        guard targetFormat == .qcow2 else {
            if !options.isEmpty { throw Failure(target, "a raw disk has no options") }
            return .raw
        }
        return .qcow2(
            try NewImageOptions.ofCopy(options, to: target, passphrases: sources.passphrases))
    }
}
