internal import Glibc

/// What the operating system answered: an `errno` value.
public struct SystemError: Error, Hashable, Sendable, CustomStringConvertible {
    /// The `errno` value, never 0.
    public let code: Int32

    public init(code: Int32) { self.code = code }

    /// The words of `strerror_r`.
    public var description: String {
        withUnsafeTemporaryAllocation(of: CChar.self, capacity: 256) { buffer in
            guard let room = buffer.baseAddress else { return "error \(code)" }
            return String(cString: strerror_r(code, room, buffer.count))
        }
    }

    /// The `errno` that the last call of this thread left.
    public static var last: SystemError { SystemError(code: errno) }

    public static let inputOutput = SystemError(code: EIO)
    public static let noSpace = SystemError(code: ENOSPC)
    public static let noMemory = SystemError(code: ENOMEM)
    public static let readOnly = SystemError(code: EROFS)
    public static let notSupported = SystemError(code: EOPNOTSUPP)
    public static let invalid = SystemError(code: EINVAL)
}
