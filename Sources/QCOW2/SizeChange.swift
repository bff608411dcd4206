/// Another size for a disk: a number of bytes, or so many more or less.
public enum SizeChange: Sendable, Equatable {
    /// So many bytes.
    case absolute(UInt64)
    /// So many bytes more.
    case growth(UInt64)
    /// So many bytes less.
    case reduction(UInt64)

    /// The new size; nil for what is below 0 or no number.
    public func byteCount(from old: UInt64) -> UInt64? {
        switch self {
        case .absolute(let byteCount): return byteCount
        case .growth(let byteCount):
            let (sum, overflows) = old.addingReportingOverflow(byteCount)
            return overflows ? nil : sum
        case .reduction(let byteCount): return byteCount <= old ? old &- byteCount : nil
        }
    }

    /// Plain bytes, with a sign where they are relative.
    public var description: String {
        switch self {
        case .absolute(let byteCount): "\(byteCount)"
        case .growth(let byteCount): "+\(byteCount)"
        case .reduction(let byteCount): "-\(byteCount)"
        }
    }

    /// Reads what `description` says.
    public init?(_ description: String) {
        guard let byteCount = UInt64(description.drop { $0 == "+" || $0 == "-" }) else {
            return nil
        }
        switch description.first {
        case "+": self = .growth(byteCount)
        case "-": self = .reduction(byteCount)
        default: self = .absolute(byteCount)
        }
    }
}

extension Image {
    /// Changes the size of the disk as `resize(to:shrinking:preallocation:)` does.
    /// - Throws: What `resize(to:shrinking:preallocation:)` throws; `.invalidArgument` for a size
    ///   below 0.
    public func resize(
        _ change: SizeChange, shrinking: Bool = false,
        preallocation: CreateOptions.Preallocation = .off
    ) throws(ImageError) {
        guard let byteCount = change.byteCount(from: size) else {
            throw ImageError(
                .invalidArgument("a disk of \(size) bytes cannot change by \(change.description)"),
                file: files[0])
        }
        try resize(to: byteCount, shrinking: shrinking, preallocation: preallocation)
    }
}
