/// Which files besides itself an image may make us open.
public struct OpenPolicy: Sendable, Equatable {
    /// Directories, besides the image's own, in which backing files and data files
    /// may lie.
    public var allowedDirectories: [String]
    /// Whether any local file may be opened, wherever it lies.
    public var trustsEverything: Bool

    /// A policy that allows the image's own directory, and what is said besides.
    public init(allowedDirectories: [String] = [], trustsEverything: Bool = false) {
        self.allowedDirectories = allowedDirectories
        self.trustsEverything = trustsEverything
    }

    /// Only files inside the image's own directory.
    public static let imageDirectory = OpenPolicy()
}
