internal import ArgumentParser
internal import Glibc
internal import ImageMount
internal import QCOW2

/// `qcowfs resize`: makes a disk larger or smaller.
struct Resize: Verb {
    static let configuration = CommandConfiguration(
        commandName: "resize",
        abstract: "Make the disk of an image larger or smaller.",
        usage: "qcowfs resize [--shrink] [--preallocation <mode>] <image> [+|-]<size>",
        discussion: """
            New bytes read as zeros.  Where there is no room for them the disk keeps its size.  On \
            an image that is mounted its daemon does the work; a loop device over it learns the \
            new size by losetup -c.
            """)

    @Flag(help: "Allow the disk to become smaller: what lies behind is lost.")
    var shrink = false

    @Option(
        help: ArgumentHelp(
            "What is allocated of new bytes: off, metadata, falloc, full.", valueName: "mode"),
        completion: .list(["off", "metadata", "falloc", "full"]))
    var preallocation = "off"

    @Flag(name: .shortAndLong, help: "Do not say what is left to do.")
    var quiet = false

    @OptionGroup var passphrases: PassphraseOptions
    @OptionGroup var policy: PolicyOptions

    // A size such as -1G looks like an option to the parser.
    @Argument(
        parsing: .allUnrecognized,
        help: ArgumentHelp("The image, and its size or by how much it changes."),
        completion: .file())
    var words: [String] = []

    func validate() throws {
        let words = words.filter { $0 != "--" }
        guard words.count == 2 else {
            throw ValidationError("an image and a size are needed, and nothing else")
        }
        guard !words[0].hasPrefix("-") || words[0].hasPrefix("./") else {
            throw ValidationError("Unknown option '\(words[0])'")
        }
        guard Self.change(words[1]) != nil else {
            throw ValidationError("'\(words[1])' is no size: 512, 64k, 10M, +1G, -1G")
        }
        guard CreateOptions.Preallocation(rawValue: preallocation) != nil else {
            throw ValidationError("--preallocation is off, metadata, falloc or full")
        }
    }

    func perform() throws -> Int32 {
        let words = words.filter { $0 != "--" }
        guard let change = Self.change(words[1]),
            let preallocation = CreateOptions.Preallocation(rawValue: preallocation)
        else { throw ValidationError("no size") }
        let (shrink, quiet) = (shrink, quiet)
        try HeldImage.change(
            words[0],
            opening: { path throws(ImageError) in
                try Image.open(
                    path,
                    options: OpenOptions(
                        policy: policy.policy, passphrases: try passphrases.source()))
            }
        ) { image throws(ImageError) in
            try image.resize(change, shrinking: shrink, preallocation: preallocation)
        } throughDaemon: { holder throws(MountError) in
            try holder.resize(change, shrinking: shrink, preallocation: preallocation)
            if case .reduction = change { return }
            if !quiet {
                Failure.print("resize: a loop device over the disk learns of it by losetup -c")
            }
        }
        return 0
    }

    private static func change(_ word: String) -> SizeChange? {
        guard let size = ByteSize(argument: String(word.drop { $0 == "+" || $0 == "-" })),
            word.dropFirst().allSatisfy({ $0 != "+" && $0 != "-" })
        else { return nil }
        switch word.first {
        case "+": return .growth(size.byteCount)
        case "-": return .reduction(size.byteCount)
        default: return .absolute(size.byteCount)
        }
    }
}

/// An image that a verb changes: itself, or through the daemon that has it mounted.
enum HeldImage {
    static func change(
        _ path: String, opening: (String) throws(ImageError) -> Image,
        _ body: (Image) throws(ImageError) -> Void,
        throughDaemon: (ImageHolder) throws(MountError) -> Void
    ) throws {
        let image: Image
        do throws(ImageError) {
            image = try opening(path)
        } catch {
            guard case .locked = error.kind, let holder = ImageHolder.find(path) else {
                throw error
            }
            return try throughDaemon(holder)
        }
        do throws(ImageError) {
            try body(image)
        } catch {
            // What went wrong first is what matters.
            do throws(ImageError) { try image.close() } catch {}
            throw error
        }
        try image.close()
    }
}
