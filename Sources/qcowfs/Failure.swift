internal import ArgumentParser
internal import Glibc
internal import QCOW2

/// Why a verb could not do its work: where it went wrong, and why, with the way out.
///
/// It becomes the one line `qcowfs: VERB: WHERE: WHY` and exit status 1.
struct Failure: Error, CustomStringConvertible {
    /// The file or mountpoint concerned; empty where there is none.
    let place: String
    /// A clause in a person's words, without a full stop.
    let reason: String

    init(_ place: String, _ reason: String) {
        self.place = place
        self.reason = reason
    }

    /// What the operating system answered about `place`.
    init(_ place: String, _ error: SystemError) {
        self.init(place, error.description)
    }

    var description: String { place.isEmpty ? reason : "\(place): \(reason)" }
}

/// A verb of the program: it does its work in `perform`, and every error it throws is printed here.
protocol Verb: ParsableCommand {
    /// Does the work and returns the exit status: 0, or what the verb gives a meaning of its own.
    ///
    /// Results go to standard output.  A thrown `ImageError` or `Failure` becomes one line on
    /// standard error and exit status 1; a `ValidationError` is wrong usage, exit status 64.
    func perform() throws -> Int32

    /// The exit status of work that could not be done.
    static var failureStatus: Int32 { get }
}

extension Verb {
    static var failureStatus: Int32 { 1 }

    func run() throws {
        let status: Int32
        do {
            status = try perform()
            // A result that did not reach the disk or the pipe is not a result.
            guard fflush(nil) == 0 else { throw Failure("standard output", .last) }
        } catch let error where Failure.isForTheParser(error) {
            throw error
        } catch {
            Failure.print("\(Self.configuration.commandName ?? ""): \(error)")
            throw ExitCode(Self.failureStatus)
        }
        if status != 0 { throw ExitCode(status) }
    }
}

extension Failure {
    /// Prints `qcowfs: sentence` to standard error, on exactly one line.
    static func print(_ sentence: String) {
        writeToStandardError("qcowfs: " + oneLine(sentence) + "\n")
    }

    /// Writes `text` as it is; there is nobody to tell where standard error cannot be written.
    static func writeToStandardError(_ text: String) {
        var text = text
        text.withUTF8 { bytes in _ = write(STDERR_FILENO, bytes.baseAddress, bytes.count) }
    }

    /// `text` with what would break the line or command the terminal shown as `\x0a`.
    static func oneLine(_ text: String) -> String {
        var line = ""
        for scalar in text.unicodeScalars {
            if scalar.properties.generalCategory == .control {
                let digits = String(scalar.value, radix: 16)
                line += "\\x" + (digits.count < 2 ? "0" : "") + digits
            } else {
                line.unicodeScalars.append(scalar)
            }
        }
        return line
    }

    /// Whether the argument parser gives this error its words and its exit status.
    static func isForTheParser(_ error: any Error) -> Bool {
        error is ExitCode || error is ValidationError || error is CleanExit
    }
}
