/// A number in an image that breaks the format or one of its limits.
public enum FormatError: Error, Equatable, Sendable, CustomStringConvertible {
    /// The first four bytes are not `QFI\xfb`.
    case notQCOW2
    /// A structure ends before it should (bytes).
    case truncated(String, needed: UInt64, found: UInt64)
    /// A field has a value that the format does not allow.
    case outOfRange(String, value: UInt64, allowed: String)
    /// An offset is not a multiple of what it must be (bytes).
    case misaligned(String, offset: UInt64, alignment: UInt64)
    /// A size or a count is over the limit of `Limits`.
    case tooLarge(String, value: UInt64, limit: UInt64)
    /// A name stands for nothing that is known here.
    case unknownName(String, name: String, known: String)
    /// Two parts of the image contradict each other.
    case inconsistent(String)

    public var description: String {
        switch self {
        case .notQCOW2: "not a qcow2 image"
        case .truncated(let what, let needed, let found):
            "\(what) is cut short (\(found) bytes of \(needed))"
        case .outOfRange(let what, let value, let allowed):
            "\(what) is \(value) (allowed: \(allowed))"
        case .misaligned(let what, let offset, let alignment):
            "\(what) at \(hex(offset)) is not aligned to \(alignment) bytes"
        case .tooLarge(let what, let value, let limit):
            "\(what) is too large (\(value), the limit is \(limit))"
        case .unknownName(let what, let name, let known):
            "\(what) is '\(name)' (known: \(known))"
        case .inconsistent(let words): words
        }
    }
}

/// A number as messages show offsets and entries.
func hex(_ number: UInt64) -> String { "0x" + String(number, radix: 16) }
