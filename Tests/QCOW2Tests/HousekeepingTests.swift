import Foundation
import TestSupport
import Testing

/// The sources keep to the rules of the house.
@Suite("Housekeeping")
struct HousekeepingTests {
    struct Source {
        let path: String
        let lines: [Substring]

        var imports: [String] {
            lines.compactMap { line in
                let words = line.split(separator: " ")
                guard let index = words.firstIndex(of: "import"), index <= 2,
                    words[..<index].allSatisfy({
                        ["public", "package", "internal", "private", "fileprivate"].contains($0)
                            || $0.hasPrefix("@")
                    }), index + 1 < words.count
                else { return nil }
                return String(words.last!.split(separator: ".")[0])
            }
        }
    }

    static let sources: [Source] = ["Sources", "Tests", "Modules", "examples"].flatMap { folder in
        let root = TestEnvironment.packageFolder
        let files = FileManager.default.enumerator(atPath: root + "/" + folder)
        return (files?.compactMap { $0 as? String } ?? [])
            .filter { $0.hasSuffix(".swift") || $0.hasSuffix(".h") }
            .filter { !$0.contains(".build") }
            .map { path in
                let text = try? String(contentsOfFile: "\(root)/\(folder)/\(path)", encoding: .utf8)
                return Source(
                    path: folder + "/" + path,
                    lines: (text ?? "").split(separator: "\n", omittingEmptySubsequences: false))
            }
    }

    private func importers(of modules: String...) -> [String] {
        Self.sources.filter { source in modules.contains { source.imports.contains($0) } }
            .map(\.path)
    }

    @Test("there are sources to look at")
    func sourcesAreThere() { #expect(Self.sources.count > 40) }

    @Test("only ImageMount/FUSE imports CFuse3")
    func fuseRoom() {
        #expect(importers(of: "CFuse3").filter { !$0.hasPrefix("Sources/ImageMount/FUSE/") } == [])
    }

    @Test("only QCOW2/Compression imports compression libraries")
    func compressionRoom() {
        #expect(
            importers(of: "CDeflate", "CZstd", "CZlib").filter {
                $0.hasPrefix("Sources/") && !$0.hasPrefix("Sources/QCOW2/Compression/")
            } == [])
    }

    @Test("only QCOW2/Encryption imports libraries of ciphers")
    func encryptionRoom() {
        #expect(
            importers(of: "CCrypto", "CNettle").filter {
                $0.hasPrefix("Sources/") && !$0.hasPrefix("Sources/QCOW2/Encryption/")
            } == [])
    }

    @Test("no library imports Foundation, the program FoundationEssentials at most")
    func foundation() {
        #expect(importers(of: "Foundation").filter { $0.hasPrefix("Sources/") } == [])
        #expect(
            importers(of: "FoundationEssentials").filter {
                $0.hasPrefix("Sources/") && !$0.hasPrefix("Sources/qcowfs/")
            } == [])
    }

    @Test("the engine does not know the mount, nor the mount the program")
    func layers() {
        #expect(importers(of: "ImageMount").filter { $0.hasPrefix("Sources/QCOW2/") } == [])
        #expect(
            importers(of: "ArgumentParser").filter {
                $0.hasPrefix("Sources/") && !$0.hasPrefix("Sources/qcowfs/")
            } == [])
    }

    @Test(
        "inside the engine nothing calls upwards",
        arguments: [
            (
                "Format",
                ["ClusterMap", "ClusterAllocator", "Commit", "Image", "Layer", "BlockDevice"]
            ),
            ("Mapping", ["ClusterAllocator", "Commit", "Image", "Layer"]),
            ("Allocation", ["Commit", "Image", "Layer"]),
            ("Commit", ["Image", "Layer"]),
            ("Storage", ["ClusterMap", "ClusterAllocator", "Commit", "Image", "Layer"]),
        ])
    func upwards(folder: String, above: [String]) {
        for source in Self.sources where source.path.hasPrefix("Sources/QCOW2/\(folder)/") {
            for (number, line) in source.lines.enumerated() {
                let code = line.split(separator: "//", omittingEmptySubsequences: false)[0]
                let words = code.split { !$0.isLetter && !$0.isNumber && $0 != "_" }.map(
                    String.init)
                for name in above where words.contains(name) {
                    Issue.record("\(source.path):\(number + 1) names \(name), which is above it")
                }
            }
        }
    }

    @Test("no line is over 100 columns")
    func columns() {
        for source in Self.sources {
            for (number, line) in source.lines.enumerated() where line.count > 100 {
                Issue.record("\(source.path):\(number + 1) has \(line.count) columns")
            }
        }
    }

    @Test("nothing is left to do")
    func leftovers() {
        let marks = ["FIX" + "ME", "TO" + "DO", "X" + "XX:"]
        for source in Self.sources {
            for (number, line) in source.lines.enumerated() {
                for mark in marks where line.contains(mark) {
                    Issue.record("\(source.path):\(number + 1) says \(mark)")
                }
            }
        }
    }

    @Test("no try! and no String(format:) in the sources")
    func bannedCalls() {
        for source in Self.sources where source.path.hasPrefix("Sources/") {
            for (number, line) in source.lines.enumerated()
            where line.contains("try!") || line.contains("String(format:") {
                Issue.record("\(source.path):\(number + 1): \(line)")
            }
        }
    }
}
