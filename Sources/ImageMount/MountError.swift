public import QCOW2

/// Why a mount could not be made, found or ended: the place, and a sentence with the way out.
public struct MountError: Error, Sendable, CustomStringConvertible {
    /// The image or mountpoint concerned; empty where there is none.
    public let place: String
    public let reason: String

    public init(_ place: String, _ reason: String) {
        self.place = place
        self.reason = reason
    }

    public init(_ place: String, _ error: SystemError) {
        self.init(place, error.description)
    }

    public init(_ error: ImageError) {
        self.init("", error.description)
    }

    public var description: String { place.isEmpty ? reason : "\(place): \(reason)" }
}
