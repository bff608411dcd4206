internal import ArgumentParser

@main
struct Qcowfs: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "qcowfs")
}
