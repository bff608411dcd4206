import Foundation
import TestSupport
import Testing

/// Another package that uses this one by URL, for `QCOW2` alone, where there is no libfuse.
@Suite(
    "As a dependency",
    .enabled(if: TestEnvironment.has("git", "unshare"), "git or unshare is missing"), .needsQemuImg)
struct PackageTests {
    let folder: TemporaryDirectory
    private let top = TestEnvironment.packageFolder

    init() throws { folder = try TemporaryDirectory(in: "/tmp") }

    private static let manifest = """
        // swift-tools-version: 6.2
        import PackageDescription

        let package = Package(
            name: "reader",
            dependencies: [.package(url: "file://URL", from: "1.0.0")],
            targets: [
                .executableTarget(
                    name: "reader", dependencies: [.product(name: "QCOW2", package: "qcowfs")])
            ])
        """

    private static let program = """
        import QCOW2

        @main
        struct Reader {
            static func main() throws {
                let image = try Image.open(
                    CommandLine.arguments[1], options: OpenOptions(access: .readOnly))
                print(image.size, try image.read(at: 1 << 20, count: 3))
                try image.close()
            }
        }
        """

    /// The programs that the documentation shows, each in a function.
    private func documentedPrograms() throws -> String {
        let files = ["README.md", "Sources/QCOW2/QCOW2.docc/QCOW2.md"]
        let programs = try files.flatMap { file in
            try String(contentsOfFile: top + "/" + file, encoding: .utf8)
                .components(separatedBy: "```swift\nimport QCOW2\n").dropFirst()
                .map { $0.components(separatedBy: "```")[0] }
        }
        #expect(programs.count >= files.count)
        return "import QCOW2\n"
            + programs.enumerated().map { "func program\($0)() throws {\($1)}\n" }.joined()
    }

    /// This package as a repository with one version: what lies here now, committed or not, so that
    /// it does not matter how it came here.
    private func makeRepository() throws -> String {
        let repository = folder.file("qcowfs")
        try Command.shell(
            """
            mkdir '\(repository)'; cd '\(top)'
            if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
                git ls-files -z --cached --others --exclude-standard
            else
                find . -path ./.build -prune -o -type f -print0
            fi | while IFS= read -rd '' file; do
                if [ -e "$file" ]; then printf '%s\\0' "$file"; fi
            done | tar -c --null -T - | tar -x -C '\(repository)'
            cd '\(repository)'
            git init -q; git add -A
            git -c user.name=test -c user.email=test@example.org commit -qm all; git tag 1.0.0
            """)
        return repository
    }

    private func makePackage(using repository: String) throws -> String {
        let package = folder.file("reader")
        try FileManager.default.createDirectory(
            atPath: package + "/Sources/reader", withIntermediateDirectories: true)
        try Self.manifest.replacing("URL", with: repository).write(
            toFile: package + "/Package.swift", atomically: true, encoding: .utf8)
        try Self.program.write(
            toFile: package + "/Sources/reader/Reader.swift", atomically: true, encoding: .utf8)
        try documentedPrograms().write(
            toFile: package + "/Sources/reader/Documented.swift", atomically: true, encoding: .utf8)
        // Other packages come from where this build has got them, so that no network is needed.
        try Command.shell(
            """
            cd '\(package)'
            for name in swift-log swift-argument-parser; do
                for copy in '\(top)'/.build/repositories/"$name"-*; do
                    if [ -d "$copy" ]; then
                        swift package config set-mirror --mirror "file://$copy" \\
                            --original "https://github.com/apple/$name"
                    fi
                done
            done
            """)
        return package
    }

    /// Runs lines of shell where nothing of libfuse but the running system's library can be seen.
    private func withoutFuse(_ lines: String) throws {
        let isRoot = geteuid() == 0
        let hiding = """
            directory=$(pkg-config --variable=pcfiledir fuse3)
            headers=$(pkg-config --variable=includedir fuse3)/fuse3
            library=$(pkg-config --variable=libdir fuse3)/libfuse3.so
            cp -a "$directory" '\(folder.file("pkgconfig"))'
            rm '\(folder.file("pkgconfig"))/fuse3.pc'
            mount --bind '\(folder.file("pkgconfig"))' "$directory"
            mount -t tmpfs none "$headers"
            mount --bind /dev/null "$library"
            ! pkg-config --exists fuse3
            test ! -e "$headers/fuse_lowlevel.h"
            """
        try Command.require(
            ["unshare"] + (isRoot ? [] : ["--map-root-user"])
                + ["--mount", "bash", "-ec", hiding + "\n" + lines], timeout: 900)
    }

    @Test("a package that uses QCOW2 by URL builds and reads an image without libfuse")
    func readsWithoutFuse() throws {
        let package = try makePackage(using: try makeRepository())
        let scratch = folder.file("build")
        try withoutFuse(
            """
            swift build -c debug --product reader --package-path '\(package)' \
                --scratch-path '\(scratch)'
            """)
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        let reader = scratch + "/debug/reader"
        #expect(try Command.require(reader, image) == "8388608 [162, 162, 162]\n")
        #expect(try !Command.require("ldd", reader).contains("fuse"))
    }
}
