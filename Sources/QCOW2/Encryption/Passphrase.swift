internal import Glibc

/// A passphrase, wiped from memory when nobody refers to it any more.
public final class Passphrase: Sendable {
    private let secret: SecretBytes

    /// A copy of `bytes`, of any length and content.
    public init(_ bytes: UnsafeRawBufferPointer) { secret = SecretBytes(copying: bytes) }

    private init(_ secret: SecretBytes) { self.secret = secret }

    /// The content of a file.  Where it ends in a newline, it is tried without and then with it.
    /// - Throws: `.system`, and `.invalidArgument` for a file that is too long.
    public static func read(fromFile path: String) throws(ImageError) -> Passphrase {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else {
            throw ImageError(.system(.last, operation: "the passphrase file"), file: path)
        }
        defer { close(descriptor) }
        // Grown by doubling, so that a pipe will do too.
        var byteCount = 4096
        var secret = SecretBytes(count: byteCount) { _ in }
        var done = 0
        while true {
            let count = try read(descriptor, into: secret.room[done...], path)
            if count == 0 { break }
            done += count
            guard done == byteCount else { continue }
            guard byteCount < Limits.passphraseByteCount else {
                throw ImageError(
                    .invalidArgument(
                        "a passphrase has at most \(Limits.passphraseByteCount) bytes"), file: path)
            }
            byteCount *= 2
            let shorter = secret
            secret = SecretBytes(count: byteCount) { $0.copyMemory(from: shorter.bytes) }
        }
        return Passphrase(UnsafeRawBufferPointer(rebasing: secret.bytes[..<done]))
    }

    private static func read(
        _ descriptor: Int32, into room: Slice<UnsafeMutableRawBufferPointer>, _ path: String
    ) throws(ImageError) -> Int {
        let room = UnsafeMutableRawBufferPointer(rebasing: room)
        do throws(SystemError) {
            return try retryingInterrupts { Glibc.read(descriptor, room.baseAddress, room.count) }
        } catch {
            throw ImageError(.system(error, operation: "reading the passphrase"), file: path)
        }
    }

    /// One that nobody can guess, for a file that nobody opens again.
    /// - Throws: `.encryption` where the system has no random bytes.
    public static func random() throws(ImageError) -> Passphrase {
        do throws(EncryptionError) {
            return Passphrase(
                try SecretBytes(count: 32) { room throws(EncryptionError) in
                    try RandomBytes.fill(room)
                })
        } catch {
            throw ImageError(.encryption(error), file: "")
        }
    }

    /// Wipes the bytes now; nothing opens with them afterwards.
    public func wipe() { secret.wipe() }

    /// What is tried, in this order.
    var candidates: [UnsafeRawBufferPointer] {
        let bytes = secret.bytes
        guard bytes.last == UInt8(ascii: "\n") else { return [bytes] }
        return [UnsafeRawBufferPointer(rebasing: bytes.dropLast()), bytes]
    }

    /// What a new image is encrypted with.
    var withoutNewline: UnsafeRawBufferPointer { candidates[0] }
}

/// Where the passphrases of encrypted files come from.
public struct PassphraseSource: Sendable {
    /// Asks a person for the passphrase of `file`; nil where there is nobody to ask.
    /// - Throws: What keeps the person from being asked.
    public typealias Question =
        @Sendable (_ file: String) throws(ImageError) -> Passphrase?

    /// Each is tried on each encrypted file, the one that stands at the file's place among the
    /// encrypted ones of its chain (top first) before the others.
    public var passphrases: [Passphrase]
    /// Asked where there are no passphrases.
    public var question: Question?
    /// Whether encrypted files are opened for their metadata alone: reading or writing guest data
    /// throws then.
    public var opensLocked = false

    /// Passphrases that are there already, and whom to ask for others.
    public init(_ passphrases: [Passphrase] = [], question: Question? = nil) {
        self.passphrases = passphrases
        self.question = question
    }

    /// The same, with what `question` answers for `file` where no passphrase was given.
    /// - Throws: `.encryption` where there is nobody to ask.
    public func answered(for file: String) throws(ImageError) -> PassphraseSource {
        guard passphrases.isEmpty else { return self }
        guard let asked = try question?(file) else {
            throw ImageError(.encryption(.passphraseNeeded), file: file)
        }
        return PassphraseSource([asked])
    }

    /// Wipes the passphrases; nothing opens with them afterwards.
    public func wipe() { for passphrase in passphrases { passphrase.wipe() } }

    /// No passphrase is asked for, and no encrypted data can be read.
    public static var locked: PassphraseSource {
        var source = PassphraseSource()
        source.opensLocked = true
        return source
    }
}

extension Passphrase: Equatable {
    /// Whether both are the same bytes.
    public static func == (left: Passphrase, right: Passphrase) -> Bool {
        left.secret.bytes.elementsEqual(right.secret.bytes)
    }
}
