internal import ArgumentParser
internal import Glibc
internal import QCOW2

/// `qcowfs convert`: copies a disk to a new file.
struct Convert: Verb {
    static let configuration = CommandConfiguration(
        commandName: "convert",
        abstract: "Copy a disk to a new raw file or image, without its holes and its backing file.",
        discussion: """
            The target appears when it is complete; until then a file of that name stays as it is. \
            So does a data file (-o data_file=FILE), which is found relative to the target. A \
            block device and the raw file of a mounted image are written in place, and keep their \
            length.

            Where the file system lets files share space, as xfs and btrfs do, uncompressed data \
            is shared and not copied, unless -S 0 wants every byte written.

            - is standard input or output.  From a pipe a raw disk can be read, and an image whose \
            clusters come in about the order of the disk, as convert and qemu-img convert write \
            them; any other image needs --spool.  To a pipe an image is written in one pass from a \
            source that can be read twice; one from a pipe, or with -c, encryption or \
            preallocation, needs --spool.
            """)

    @Option(
        name: .customShort("f"),
        help: ArgumentHelp("The source's format; found by its magic without.", valueName: "format"))
    var sourceFormat: DiskFormat?

    @Option(
        name: .customShort("O"), help: ArgumentHelp("The target's format.", valueName: "format"))
    var targetFormat = DiskFormat.raw

    @Option(
        name: [.customShort("o"), .customLong("option")],
        help: ArgumentHelp("Options of the new image, as create has them.", valueName: "OPT=VALUE"))
    var options: [String] = []

    @Flag(name: .customShort("c"), help: "Compress the clusters of the new image.")
    var compresses = false

    @Flag(help: "With -c: take less time for a longer file: zlib up to 1 %, zstd up to 5 %.")
    var fast = false

    @Option(
        name: .customShort("l"),
        help: ArgumentHelp(
            "Copy this internal snapshot, by identifier or name.", valueName: "snapshot"))
    var snapshot: String?

    @Option(
        name: .customShort("S"),
        help: ArgumentHelp(
            "Runs of zeros of so many bytes become holes; 0 writes them out.", valueName: "bytes"))
    var sparse = ByteSize(byteCount: 4096)

    @Option(
        name: .customShort("m"),
        help: ArgumentHelp("Threads that copy; one a processor without.", valueName: "count"))
    var threads: Int?

    @Option(
        help: ArgumentHelp(
            "Where a file without a name keeps what a pipe brings, or cannot take yet.",
            valueName: "dir"), completion: .directory)
    var spool: String?

    @OptionGroup var sources: SourceOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The disk to copy; - is standard input.", completion: .file())
    var source: String

    @Argument(
        help: "The file to make, one that is there is replaced; - is standard output.",
        completion: .file())
    var target: String

    func validate() throws {
        guard (1...256).contains(threads ?? 1) else {
            throw ValidationError("-m takes a number of threads from 1 to 256")
        }
        if fast && !compresses {
            throw ValidationError("--fast needs -c: it says how clusters are compressed")
        }
        if compresses && targetFormat == .raw {
            throw ValidationError("-c needs -O qcow2: a raw disk cannot be compressed")
        }
    }

    func perform() throws -> Int32 {
        var conversion = Conversion(to: try conversionTarget())
        conversion.sparseByteCount = sparse.byteCount
        conversion.compresses = compresses
        conversion.compressionEffort = fast ? .low : .usual
        conversion.threadCount = threads ?? Processors.count
        if target == "-" {
            // A reader that goes away is an error like others.
            signal(SIGPIPE, SIG_IGN)
        } else {
            Interruption.watch()
        }
        do throws(ImageError) {
            switch try incoming() {
            case .disk(let disk): try copy(disk, conversion)
            case .stream(let stream): try copy(stream, conversion)
            }
        } catch {
            guard error.kind == .cancelled else { throw error }
            let state =
                target != "-" && Conversion.writesInPlace(target)
                ? "it is written in place, and incomplete"
                : "nothing was left there, and what was there stays"
            throw Failure(target, "interrupted; \(state)")
        }
        return 0
    }

    private func incoming() throws(ImageError) -> IncomingDisk {
        guard source == "-" else {
            return .disk(
                try sources.open(source, format: sourceFormat, snapshot: snapshotWord))
        }
        return try IncomingDisk(
            descriptor: STDIN_FILENO, name: "standard input", format: sourceFormat?.source,
            snapshot: snapshotWord, spoolDirectory: spool, options: try sources.openOptions(),
            isCancelled: { Interruption.hasCome })
    }

    private func copy(_ disk: SourceDisk, _ conversion: Conversion) throws(ImageError) {
        let bar = progress.report(of: "convert")
        let report = { (part: Double) in
            bar?.update(part)
            return !Interruption.hasCome
        }
        do throws(ImageError) {
            if target == "-" {
                try conversion.run(
                    from: disk, toDescriptor: STDOUT_FILENO, name: "standard output",
                    spoolDirectory: spool, progress: report)
            } else {
                try conversion.run(from: disk, toFileAt: target, progress: report)
            }
        } catch {
            bar?.clear()
            throw error
        }
        bar?.finish()
        try disk.close()
    }

    /// How far it has come is not known before the end.
    private func copy(_ stream: RawStream, _ conversion: Conversion) throws(ImageError) {
        guard target == "-" else { return try conversion.run(from: stream, toFileAt: target) }
        guard targetFormat == .raw else {
            throw ImageError(
                .invalidArgument(
                    "an image is written to a pipe from a source that can be read twice: "
                        + "give --spool DIR"), file: "standard input")
        }
        try Conversion.copy(stream, toDescriptor: STDOUT_FILENO, name: "standard output")
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
