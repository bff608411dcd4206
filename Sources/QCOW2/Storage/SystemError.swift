internal import Glibc

/// What the operating system answered: an `errno` value.
public struct SystemError: Error, Hashable, Sendable, CustomStringConvertible {
    /// The `errno` value, never 0.
    public let code: Int32

    /// The error with this `errno` value, which is not 0.
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

    /// `EIO`
    public static let inputOutput = SystemError(code: EIO)
    /// `ENOSPC`
    public static let noSpace = SystemError(code: ENOSPC)
    /// `ENOMEM`
    public static let noMemory = SystemError(code: ENOMEM)
    /// `EROFS`
    public static let readOnly = SystemError(code: EROFS)
    /// `EOPNOTSUPP`
    public static let notSupported = SystemError(code: EOPNOTSUPP)
    /// `EINVAL`
    public static let invalid = SystemError(code: EINVAL)
}
