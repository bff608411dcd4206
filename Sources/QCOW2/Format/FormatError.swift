/// A number in an image that breaks the format or one of its limits.
public enum FormatError: Error, Equatable, Sendable, CustomStringConvertible {
    case notQCOW2
    public var description: String { "not a qcow2 image" }
}
