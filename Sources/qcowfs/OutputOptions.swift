internal import ArgumentParser
internal import QCOW2

/// How a result is printed.
struct OutputOptions: ParsableArguments {
    enum Form: String, ExpressibleByArgument, CaseIterable { case human, json }

    @Option(help: "Print for people or as JSON.")
    var output = Form.human

    @Flag(help: "The same as --output json.")
    var json = false

    var form: Form { json ? .json : output }
}

/// Which other files an image may make us open.
struct PolicyOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp("Backing files may lie in this directory too.", valueName: "dir"),
        completion: .directory)
    var allowPath: [String] = []

    @Flag(help: "Backing files may lie anywhere.")
    var trustPaths = false

    var policy: OpenPolicy {
        OpenPolicy(allowedDirectories: allowPath, trustsEverything: trustPaths)
    }
}
