import Foundation
import TestSupport
import Testing

/// Everything public of the library is documented, and DocC finds no fault.
@Suite(
    "Documentation",
    .enabled(
        if: TestEnvironment.has("swift-symbolgraph-extract"),
        "the toolchain's swift-symbolgraph-extract is not in PATH"))
struct DocumentationTests {
    /// A symbol as the compiler describes it.
    private struct Symbol: Decodable {
        struct Lines: Decodable {
            struct Line: Decodable { let text: String }
            let lines: [Line]
        }
        struct Location: Decodable {
            struct Position: Decodable { let line: Int }
            let uri: String
            let position: Position
        }
        struct Fragment: Decodable { let spelling: String }

        let pathComponents: [String]
        let docComment: Lines?
        let location: Location?
        let declarationFragments: [Fragment]?

        var documentation: String { docComment?.lines.map(\.text).joined(separator: " ") ?? "" }
        var throwsErrors: Bool {
            declarationFragments?.contains { $0.spelling == "throws" } == true
        }
        /// File, line and name; nil for what the compiler or another module has made.
        var place: String? {
            guard let location, let range = location.uri.range(of: "Sources/QCOW2/") else {
                return nil
            }
            let name = pathComponents.joined(separator: ".")
            return "\(location.uri[range.lowerBound...]):\(location.position.line + 1) \(name)"
        }
    }

    private struct Graph: Decodable { let symbols: [Symbol] }

    let folder: TemporaryDirectory
    private let graph: String

    init() throws {
        folder = try TemporaryDirectory()
        let top = TestEnvironment.packageFolder
        let modules = TestEnvironment.program.dropLast("qcowfs".count) + "Modules"
        let maps = try FileManager.default.contentsOfDirectory(atPath: top + "/Modules")
        let machine = try Command.require("uname", "-m").filter { $0 != "\n" }
        try Command.require(
            [
                "swift-symbolgraph-extract", "-module-name", "QCOW2", "-I", String(modules),
                "-target", "\(machine)-unknown-linux-gnu", "-minimum-access-level", "public",
                "-output-dir", folder.path,
            ]
                + maps.flatMap {
                    ["-Xcc", "-fmodule-map-file=\(top)/Modules/\($0)/module.modulemap"]
                }
        )
        graph = folder.file("QCOW2.symbols.json")
    }

    @Test("every public symbol says what it is, and what it throws")
    func symbols() throws {
        let data = try Data(contentsOf: URL(fileURLWithPath: graph))
        let symbols = try JSONDecoder().decode(Graph.self, from: data).symbols
        #expect(symbols.count { $0.place != nil } > 500)
        for symbol in symbols {
            guard let place = symbol.place else { continue }
            #expect(symbol.docComment != nil, "\(place) is not documented")
            let words = symbol.documentation
            if symbol.throwsErrors, !words.contains("hrow") {
                Issue.record("\(place) does not say what it throws")
            }
        }
    }

    @Test(
        "DocC resolves every link",
        .enabled(if: TestEnvironment.has("docc"), "the toolchain's docc is not in PATH"))
    func links() throws {
        let result = try Command.run(
            [
                "docc", "convert", TestEnvironment.packageFolder + "/Sources/QCOW2/QCOW2.docc",
                "--additional-symbol-graph-dir", folder.path, "--output-path",
                folder.file("out.doccarchive"), "--fallback-display-name", "QCOW2",
                "--fallback-bundle-identifier", "qcowfs.QCOW2",
            ], timeout: 300)
        #expect(result.status == 0, "\(result)")
        #expect(
            !result.errors.contains("warning:") && !result.output.contains("warning:"), "\(result)")
    }
}
