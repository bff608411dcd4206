import Foundation
import TestSupport
import Testing

/// `examples/install`, in directories of its own: what it installs works, and goes again.
@Suite("Installing")
struct InstallTests {
    let folder: TemporaryDirectory
    let prefix: String

    init() throws {
        folder = try TemporaryDirectory()
        prefix = folder.file("a prefix")
    }

    private func install(
        _ words: String..., helper: String = "", staging: String = ""
    ) throws -> String {
        try Command.require(
            ["env", "DESTDIR=\(staging)", TestEnvironment.packageFolder + "/examples/install"]
                + ["--prefix", prefix, "--binary", TestEnvironment.program, "--helper", helper]
                + words)
    }

    private func files(below path: String) throws -> [String] {
        try Command.require("find", path, "-mindepth", "1").split(separator: "\n").map(String.init)
    }

    @Test("everything goes below the prefix, a second time too, and uninstalling leaves nothing")
    func installsAndUninstalls() throws {
        let said = try install()
        let first = try files(below: folder.path)
        for path in ["bin/qcowfs", "sbin/mount.qcowfs", "share/man/man8/mount.qcowfs.8"] {
            #expect(first.contains("\(prefix)/\(path)"))
            #expect(said.contains("installed \(prefix)/\(path)\n"))
        }
        #expect(try install() == said)
        #expect(try files(below: folder.path) == first)
        let program = "\(prefix)/bin/qcowfs"
        #expect(try Command.require(program, "--version") == qcowfs("--version").output)
        _ = try install("--uninstall")
        #expect(try files(below: folder.path) == [])
    }

    @Test("what others have put there stays")
    func othersStay() throws {
        mkdir(prefix, 0o755)
        mkdir(prefix + "/bin", 0o755)
        _ = try install()
        try Command.require("touch", prefix + "/bin/other", prefix + "/share/man/man1/other.1")
        _ = try install("--uninstall")
        let left = try files(below: prefix).filter { !$0.hasSuffix("/other") }
        #expect(
            Set(left)
                == Set(
                    ["bin", "share", "share/man", "share/man/man1"].map {
                        "\(prefix)/\($0)"
                    } + ["\(prefix)/share/man/man1/other.1"]))
    }

    @Test("with DESTDIR everything goes below it, and leads to where it will be")
    func staging() throws {
        _ = try install(helper: "/sbin", staging: folder.file("stage"))
        #expect(access(prefix, F_OK) != 0)
        let helper = folder.file("stage") + "/sbin/mount.qcowfs"
        let target = try Command.require("readlink", helper)
        #expect(target == "\(prefix)/bin/qcowfs\n")
        _ = try install("--uninstall", staging: folder.file("stage"))
        #expect(try files(below: folder.path) == [])
    }

    @Test("another program's helper is left alone")
    func otherHelper() throws {
        let sbin = folder.file("sbin")
        mkdir(sbin, 0o755)
        symlink("/bin/true", sbin + "/mount.qcowfs")
        #expect(try install(helper: sbin).contains("left, it is another program: \(sbin)/mount.q"))
        _ = try install("--uninstall", helper: sbin)
        #expect(try files(below: folder.path) == [sbin, sbin + "/mount.qcowfs"])
        #expect(try Command.require("readlink", sbin + "/mount.qcowfs") == "/bin/true\n")
    }

    @Test("wrong usage and nothing to uninstall are said")
    func refusals() throws {
        let program = TestEnvironment.packageFolder + "/examples/install"
        #expect(try Command.run([program, "--nothing"]).status == 64)
        #expect(try Command.run([program, "--prefix"]).status == 64)
        let missing = try Command.run([program, "--uninstall", "--prefix", prefix])
        #expect(missing.status == 1 && missing.errors.contains("nothing is installed"))
    }
}

/// What the program says about itself, as manual pages and as completions.
@Suite("Manual pages and completions")
struct ManualTests {
    private static let help = Result { try Help.read() }

    /// The parts of the machine-readable help that pages are made of.
    private struct Help: Decodable, Sendable {
        struct Command: Decodable, Sendable {
            let commandName: String
            let arguments: [Argument]?
            let subcommands: [Command]?
        }
        struct Argument: Decodable, Sendable {
            let names: [Name]?
            let shouldDisplay: Bool
        }
        struct Name: Decodable, Sendable {
            let kind: String
            let name: String
        }

        let command: Command

        static func read() throws -> Command {
            let text = try TestSupport.Command.require(
                TestEnvironment.program, "--experimental-dump-help")
            return try JSONDecoder().decode(Help.self, from: Data(text.utf8)).command
        }
    }

    let folder: TemporaryDirectory

    init() throws { folder = try TemporaryDirectory() }

    private func makePages() throws -> [String] {
        try Command.require(
            TestEnvironment.packageFolder + "/examples/manual-pages", TestEnvironment.program,
            folder.path)
        return try Command.shell("ls \(folder.path)/man*/*").split(separator: "\n").map(String.init)
    }

    @Test("each verb has a page, with each of its options")
    func pages() throws {
        _ = try makePages()
        let verbs = try #require(try Self.help.get().subcommands).filter {
            $0.commandName != "help"
        }
        #expect(verbs.count > 20)
        let main = try String(contentsOfFile: folder.path + "/man1/qcowfs.1", encoding: .utf8)
        for verb in verbs {
            #expect(main.contains("qcowfs\\-\(verb.commandName)"))
            let page = try String(
                contentsOfFile: folder.path + "/man1/qcowfs-\(verb.commandName).1", encoding: .utf8)
            let arguments = verb.arguments?.filter(\.shouldDisplay) ?? []
            for name in arguments.flatMap({ $0.names ?? [] }) {
                let dashes = name.kind == "long" ? "\\-\\-" : "\\-"
                let words = dashes + name.name.replacing("-", with: "\\-")
                #expect(page.contains(words), "\(verb.commandName) \(words)")
            }
        }
        let helper = try String(
            contentsOfFile: folder.path + "/man8/mount.qcowfs.8", encoding: .utf8)
        #expect(helper.contains("\nThe same as read\\-only.") && helper.contains("/etc/fstab"))
    }

    @Test(
        "groff has nothing to say against them, and finds their names",
        .enabled(if: TestEnvironment.has("groff", "lexgrog"), "groff or man-db is missing"))
    func lint() throws {
        for page in try makePages() {
            let result = try Command.run(["groff", "-man", "-Tutf8", "-ww", "-z", page])
            #expect(result.status == 0 && result.errors.isEmpty, "\(result)")
            try Command.require("lexgrog", page)
        }
    }

    @Test("bash completes verbs, options, values and files")
    func bash() throws {
        let program = TestEnvironment.program
        let script = folder.file("completion")
        try Command.shell("\(program) --generate-completion-script bash > \(script)")
        try Command.require("touch", folder.file("disk.qcow2"))
        func completions(_ words: String) throws -> [String] {
            // What bash does when Tab is pressed.
            let answer = try Command.shell(
                """
                source \(script); cd \(folder.path)
                COMP_WORDS=(qcowfs \(words)); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
                COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}
                _qcowfs qcowfs "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}" || true
                echo "${COMPREPLY[@]}"
                """)
            return answer.split { $0 == " " || $0 == "\n" }.map(String.init)
        }
        #expect(try completions("conv") == ["convert"])
        #expect(try completions("mount --commit") == ["--commit-interval"])
        #expect(try completions("convert -O ''") == ["raw", "qcow2"])
        #expect(try completions("info dis") == ["disk.qcow2"])
    }

    @Test("zsh and fish can read their completions", arguments: ["zsh", "fish"])
    func otherShells(shell: String) throws {
        let script = folder.file("completion")
        try Command.shell(
            "\(TestEnvironment.program) --generate-completion-script \(shell) > \(script)")
        let text = try String(contentsOfFile: script, encoding: .utf8)
        #expect(text.contains("dehydrate") && text.contains("commit-interval"))
        if TestEnvironment.has(shell) { try Command.require(shell, "-n", script) }
    }
}

/// `mount -t qcowfs` and fstab, through an installed helper.
@Suite(
    "Mounting by mount(8)",
    .enabled(if: TestEnvironment.canLoop, "/dev/fuse, loop devices or root is missing"),
    .needsQemuImg)
struct MountHelperTests {
    let folder: TemporaryDirectory

    init() throws {
        folder = try TemporaryDirectory()
        mkdir(folder.file("mnt"), 0o755)
        try makeImage(folder.file("my disk.qcow2"))
    }

    /// Runs lines of shell with the helper in /sbin, where nobody else sees it.
    private func withHelper(_ lines: String) throws -> String {
        try Command.require(
            "unshare", "--mount", "bash", "-ec",
            """
            cd '\(folder.path)'
            mkdir sbin; mount --bind sbin /sbin
            '\(TestEnvironment.packageFolder)/examples/install' --prefix "$PWD/prefix" \
                --binary '\(TestEnvironment.program)' >/dev/null
            trap 'prefix/bin/qcowfs umount mnt 2>/dev/null || true' EXIT
            \(lines)
            """)
    }

    @Test("mount -t qcowfs mounts with the options that mount(8) has", arguments: ["", "fuse."])
    func mount(prefix: String) throws {
        let said = try withHelper(
            """
            mount -t \(prefix)qcowfs -o ro,noatime,allow_other,commit-interval=1 'my disk.qcow2' mnt
            findmnt -no FSTYPE,SOURCE,OPTIONS mnt
            stat -c %s,%A mnt/*.raw
            head -c 1 mnt/*.raw | od -An -tx1
            ! mount -t \(prefix)qcowfs missing.qcow2 mnt 2>&1
            prefix/bin/qcowfs umount mnt
            prefix/bin/qcowfs list
            """)
        #expect(said.hasPrefix("fuse.qcowfs "), "\(said)")
        #expect(said.contains("\(folder.path)/my disk.qcow2 ro,"), "\(said)")
        #expect(said.contains("8388608,-r--------\n a1\n"), "\(said)")
        #expect(said.contains("missing.qcow2: No such file or directory"), "\(said)")
        #expect(!said.hasSuffix(".qcow2\n"), "\(said)")
    }

    @Test("mount -f mounts nothing, and a mount that is there keeps its options")
    func fakeAndRemount() throws {
        let said = try withHelper(
            """
            mount -f -t qcowfs 'my disk.qcow2' mnt
            ! mountpoint -q mnt
            ! sbin/mount.qcowfs 'my disk.qcow2' mnt -o remount,ro 2>&1
            """)
        #expect(said.hasPrefix("qcowfs: mount: mnt: the options of a mount"), "\(said)")
    }

    @Test("a line of fstab mounts once, however often it is asked to", arguments: ["", "fuse."])
    func fstab(prefix: String) throws {
        let said = try withHelper(
            """
            image="$PWD/my\\\\040disk.qcow2"
            echo "$image $PWD/mnt \(prefix)qcowfs rw,umask=022,uid=5,nofail,_netdev,x-a.b=c 0 0" \
                >fstab
            mount -a -T fstab
            mount -a -T fstab
            findmnt -no FSTYPE mnt
            stat -c '%u %A' mnt/*.raw
            umount mnt
            """)
        #expect(said == "fuse.qcowfs\n5 -rw-r--r--\n", "\(said)")
        #expect(try QemuImg.check(folder.file("my disk.qcow2")).status == 0)
    }
}
