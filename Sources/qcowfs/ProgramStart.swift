internal import CStart
internal import Glibc

/// What the program finds when it starts, whoever called it.
enum ProgramStart {
    /// The words of the command line, the program's name first.
    static let arguments = (0..<qcowfs_argument_count()).map {
        String(cString: qcowfs_argument($0))
    }

    /// Keeps what the caller did from becoming damage.
    static func prepare() {
        occupyStandardStreams()
        // A file that may not grow any more is an error like others (setrlimit(2)).
        signal(SIGXFSZ, SIG_IGN)
    }

    /// A stream that the caller closed stays unusable, but its number is taken: an image that got
    /// it would be read as input, or have messages written into it.
    private static func occupyStandardStreams() {
        for stream in STDIN_FILENO...STDERR_FILENO where fcntl(stream, F_GETFD) < 0 {
            _ = open("/", O_PATH)
        }
    }
}
