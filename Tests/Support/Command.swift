package import Foundation

/// A program that a test runs, and what came of it.
package struct Command {
    package struct Result: Sendable, CustomStringConvertible {
        package let command: String
        /// The exit status, or 128 + N for a program that signal N ended.
        package let status: Int32
        package let output: String
        package let errors: String

        package var description: String {
            "`\(command)` ended with \(status): \(errors)\(output)"
        }
    }

    package struct Failure: Error, CustomStringConvertible {
        package let description: String
        package init(description: String) { self.description = description }
    }

    /// A program that runs on while the test does other things.
    package final class Running: Sendable {
        package let pid: pid_t
        private let command: String
        private let output: TestFile
        private let errors: TestFile

        fileprivate init(pid: pid_t, command: String, output: TestFile, errors: TestFile) {
            (self.pid, self.command) = (pid, command)
            (self.output, self.errors) = (output, errors)
        }

        /// Waits for the end; after `timeout` seconds the program is killed, which is a failure.
        package func wait(timeout: Double = 120) throws -> Result {
            let deadline = Date(timeIntervalSinceNow: timeout)
            var pause: UInt32 = 300
            var status: Int32 = 0
            while waitpid(pid, &status, WNOHANG) == 0 {
                if Date() > deadline {
                    kill(pid, SIGKILL)
                    waitpid(pid, &status, 0)
                    throw Failure(
                        description: "`\(command)` did not end within \(timeout) s: "
                            + text(of: errors))
                }
                usleep(pause)
                pause = min(pause * 2, 5000)
            }
            let signal = status & 0x7f
            return Result(
                command: command, status: signal == 0 ? (status >> 8) & 0xff : 128 + signal,
                output: text(of: output), errors: text(of: errors))
        }

        /// What the program has printed so far.
        package var printed: String { text(of: output) + text(of: errors) }

        private func text(of file: TestFile) -> String {
            let bytes = (try? file.read(0..<(file.byteCount()))) ?? []
            return String(decoding: bytes, as: UTF8.self)
        }
    }

    /// Starts `words` with stdin from `input` (a path) and without this process's descriptors.
    ///
    /// `environment`: the whole environment, this process's own where nil.
    package static func start(
        _ words: [String], input: String = "/dev/null", environment: [String]? = nil
    ) throws -> Running {
        let output = try scratchFile()
        let errors = try scratchFile()
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, 0, input, O_RDONLY, 0)
        posix_spawn_file_actions_adddup2(&actions, output.descriptor, 1)
        posix_spawn_file_actions_adddup2(&actions, errors.descriptor, 2)

        // The threads that tests run on block signals; a program from a shell has none blocked.
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        var signals = sigset_t()
        sigemptyset(&signals)
        posix_spawnattr_setsigmask(&attributes, &signals)
        posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK))

        let arguments = words.map { strdup($0) } + [nil]
        let variables = (environment ?? inherited).map { strdup($0) } + [nil]
        defer { (arguments + variables).forEach { free($0) } }
        var pid: pid_t = 0
        let code = posix_spawnp(
            &pid, words[0], &actions, &attributes, arguments, variables)
        guard code == 0 else { throw CallError(call: "start \(words[0])", code: code) }
        return Running(
            pid: pid, command: words.joined(separator: " "), output: output, errors: errors)
    }

    /// Runs `words` to the end.
    package static func run(
        _ words: [String], input: String = "/dev/null", environment: [String]? = nil,
        timeout: Double = 120
    ) throws -> Result {
        try start(words, input: input, environment: environment).wait(timeout: timeout)
    }

    /// Runs `words`, which must end with status 0, and returns what they printed.
    @discardableResult
    package static func require(
        _ words: String..., timeout: Double = 120
    ) throws -> String {
        try require(words, timeout: timeout)
    }

    @discardableResult
    package static func require(_ words: [String], timeout: Double = 120) throws -> String {
        var result = try run(words, timeout: timeout)
        // Deriving a key, QEMU now and then fails to tell on a busy machine how long it took.
        for _ in 0..<10 where result.errors.contains("accurate CPU usage") {
            result = try run(words, timeout: timeout)
        }
        guard result.status == 0 else { throw Failure(description: result.description) }
        return result.output
    }

    /// Runs a line of shell, which must end with status 0.
    @discardableResult
    package static func shell(_ line: String, timeout: Double = 120) throws -> String {
        try require(["bash", "-o", "pipefail", "-ec", line], timeout: timeout)
    }

    private static let inherited: [String] = ProcessInfo.processInfo.environment
        .map { key, value in
            // System tools live where a user's PATH does not always look.
            key == "PATH" ? "PATH=\(value):/usr/sbin:/sbin" : "\(key)=\(value)"
        }

    private static func scratchFile() throws -> TestFile {
        try TestFile(TestEnvironment.scratch, O_RDWR | O_TMPFILE)
    }
}
