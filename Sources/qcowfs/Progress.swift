internal import ArgumentParser
internal import Glibc
internal import QCOW2

/// How long work says how far it has come.
struct ProgressOptions: ParsableArguments {
    @Flag(name: [.customShort("p"), .long], help: "Show a progress bar, also without a terminal.")
    var progress = false

    @Flag(name: .shortAndLong, help: "Show no progress bar.")
    var quiet = false

    @Option(
        help: ArgumentHelp("Write lines of JSON with the percentage there.", valueName: "number"))
    var progressFd: Int32?

    func validate() throws {
        guard let progressFd else { return }
        // A number that is free now would be that of a file opened later, the image for one.
        let flags = fcntl(progressFd, F_GETFL)
        guard flags >= 0, flags & O_ACCMODE != O_RDONLY else {
            throw ValidationError("--progress-fd \(progressFd): no file is open for writing there")
        }
    }

    /// Nil where nobody wants to know.
    func report(of verb: String) -> ProgressReport? {
        let wantsBar = !quiet && (progress || isatty(STDERR_FILENO) != 0)
        guard wantsBar || progressFd != nil else { return nil }
        return ProgressReport(verb, showsBar: wantsBar, descriptor: progressFd)
    }

    /// Does long work, which a first Ctrl-C or SIGTERM ends between two steps.
    /// - Parameters:
    ///   - place: The file that a message is about.
    ///   - outcome: What is true when the work was interrupted.
    ///   - work: Given what to tell the part that is done; that answers false to end the work.
    func run<Result>(
        _ verb: String, on place: String, interrupted outcome: String,
        _ work: (_ progress: @escaping (Double) -> Bool) throws(ImageError) -> Result
    ) throws -> Result {
        try Self.run(report(of: verb), on: place, interrupted: outcome, work)
    }

    /// The same with a bar that the caller may clear.
    static func run<Result>(
        _ bar: ProgressReport?, on place: String, interrupted outcome: String,
        _ work: (_ progress: @escaping (Double) -> Bool) throws(ImageError) -> Result
    ) throws -> Result {
        Interruption.watch()
        do throws(ImageError) {
            let result = try work {
                bar?.update($0)
                return !Interruption.hasCome
            }
            bar?.finish()
            return result
        } catch {
            bar?.clear()
            guard error.kind == .cancelled else { throw error }
            throw Failure(place, "interrupted; " + outcome)
        }
    }
}

/// Shows how far a job has come, ten times a second at most.
final class ProgressReport {
    private let verb: String
    private let showsBar: Bool
    private let descriptor: Int32?
    private let start = ContinuousClock.now
    private var last = ContinuousClock.now
    private var isOnScreen = false

    init(_ verb: String, showsBar: Bool, descriptor: Int32?) {
        self.verb = verb
        self.showsBar = showsBar
        self.descriptor = descriptor
    }

    /// - Parameter fraction: The part that is done, from 0 to 1.
    func update(_ fraction: Double) {
        let now = ContinuousClock.now
        guard now - last >= .milliseconds(100) else { return }
        last = now
        show(fraction, elapsed: now - start)
    }

    /// Takes the bar away, so that a line can be printed.
    func clear() {
        guard isOnScreen else { return }
        Failure.writeToStandardError("\r\u{1B}[K")
        isOnScreen = false
    }

    /// The job is done.
    func finish() {
        clear()
        if descriptor != nil { write(percent: 1) }
    }

    private func show(_ fraction: Double, elapsed: Duration) {
        if descriptor != nil { write(percent: fraction) }
        guard showsBar else { return }
        let seconds =
            Double(elapsed.components.seconds) + 1e-18 * Double(elapsed.components.attoseconds)
        let rate = fraction / max(seconds, 0.001)
        let width = 30
        let filled = Int(fraction * Double(width))
        let bar =
            String(repeating: "#", count: filled) + String(repeating: "-", count: width - filled)
        let left = rate > 0 ? Self.clock((1 - fraction) / rate) : "?"
        Failure.writeToStandardError(
            "\r\u{1B}[K\(verb) [\(bar)] \(Self.tenths(fraction * 100)) %, "
                + "\(Self.tenths(rate * 100)) %/s, \(left) left")
        isOnScreen = true
    }

    private func write(percent fraction: Double) {
        guard let descriptor else { return }
        var line = "{\"progress\": \(Self.tenths(fraction * 100))}\n"
        line.withUTF8 { bytes in _ = Glibc.write(descriptor, bytes.baseAddress, bytes.count) }
    }

    private static func tenths(_ value: Double) -> String {
        let tenths = Int((value * 10).rounded(.down))
        return "\(tenths / 10).\(tenths % 10)"
    }

    private static func clock(_ seconds: Double) -> String {
        let whole = Int(min(seconds, 359_999))
        let (minutes, rest) = (whole / 60, whole % 60)
        return "\(minutes):\(rest < 10 ? "0" : "")\(rest)"
    }
}
