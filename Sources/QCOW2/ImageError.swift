internal import Glibc

/// Why an image could not be opened, read, written or made.
///
/// `description` is one sentence without a trailing full stop: `FILE: WHAT`, with the way out
/// where there is one.  `code` is what a client of a mounted image gets.
public struct ImageError: Error, Equatable, Sendable, CustomStringConvertible {
    /// What went wrong, with the numbers and words that belong to it.
    public enum Kind: Equatable, Sendable {
        /// No qcow2 magic.
        case notQCOW2
        /// A number in the image breaks the format or exceeds a limit.
        case malformed(FormatError)
        /// The image uses something that this version does not read or write.
        case unsupported(Feature)
        /// An entry met while reading or writing makes no sense; the words say which.
        case corrupt(String)
        /// The corrupt bit is set and the image was to be written.
        case markedCorrupt
        /// Another program holds the file (`holder` says which, where it can be found).
        case locked(holder: String?, wanted: LockRequest)
        /// The open policy forbids a file that the image names.
        case denied(reference: String, rule: String)
        /// A backing file is missing or unreadable, or the chain loops or is too deep.
        case backing(String)
        /// The external data file is missing, unreadable or not named.
        case dataFile(String)
        /// A snapshot (by name) that somebody reads was to be deleted.
        case snapshotInUse(String)
        /// Encrypted data that stays closed, with the reason.
        case encryption(EncryptionError)
        /// A write to something opened read-only.
        case readOnly
        /// An earlier write or sync failed, and the image takes no writes any more.
        case failed(SystemError)
        /// Outside of the virtual disk, or an argument that makes no sense.
        case invalidArgument(String)
        /// The operating system said no; the words name the operation.
        case system(SystemError, operation: String)
        /// The operation was stopped by its caller.
        case cancelled
    }

    /// What was wanted when a lock was refused.
    public enum LockRequest: Equatable, Sendable {
        /// To read while nobody writes.
        case read
        /// To write while nobody reads or writes.
        case write
    }

    /// What went wrong.
    public var kind: Kind
    /// The file concerned; empty where a device has no name.
    public var file: String

    /// An error that concerns `file`, which may be empty.
    public init(_ kind: Kind, file: String) {
        self.kind = kind
        self.file = file
    }

    /// The `errno` for a client: EIO for a corrupt image, EROFS, ENOSPC, EINVAL…
    public var code: Int32 {
        switch kind {
        case .system(let error, _), .failed(let error): error.code
        case .readOnly, .markedCorrupt: EROFS
        case .invalidArgument: EINVAL
        case .unsupported: EOPNOTSUPP
        case .denied: EACCES
        case .locked, .snapshotInUse: EBUSY
        case .cancelled: ECANCELED
        case .encryption(.writingLegacyAES): EROFS
        case .encryption: EACCES
        case .notQCOW2, .malformed, .corrupt, .backing, .dataFile: EIO
        }
    }

    /// Whether space was missing: everything is as it was, and space may come back.
    var isNoSpace: Bool {
        if case .system(.noSpace, _) = kind { return true }
        return false
    }

    public var description: String {
        file.isEmpty ? reason : "\(file): \(reason)"
    }

    /// The sentence without the file.
    package var reason: String {
        switch kind {
        case .notQCOW2: "not a qcow2 image"
        case .malformed(let error): error.description
        case .unsupported(let feature): feature.refusal
        case .corrupt(let words): words
        case .markedCorrupt:
            "marked corrupt: mount it with --read-only to save its data, "
                + "or repair it with check --repair all"
        case .locked(let holder, let wanted):
            "in use\(holder.map { " by \($0)" } ?? " by another program")"
                + (wanted == .read ? ", which writes to it" : "")
        case .denied(let reference, let rule):
            "names \(reference), which \(rule); allow it with --allow-path DIR or --trust-paths"
        case .backing(let words), .dataFile(let words): words
        case .snapshotInUse(let name):
            "the snapshot '\(name)' is being read: close or detach its file first"
        case .encryption(let error): error.description
        case .readOnly: "opened read-only"
        case .failed(let error):
            "takes no writes any more: an earlier write or sync failed (\(error))"
        case .invalidArgument(let words): words
        case .system(let error, let operation): "\(operation): \(error)"
        case .cancelled: "cancelled"
        }
    }
}

/// A part of the format, by name.
public enum Feature: Equatable, Sendable {
    /// A version of the format other than 2 and 3.
    case version(UInt32)
    /// Incompatible feature bits that nobody here knows; names come from the feature name table.
    case unknownIncompatible(names: [String], bits: UInt64)
    /// A compression type other than deflate and zstd.
    case compressionType(UInt8)

    var refusal: String {
        switch self {
        case .version(let number): "qcow2 version \(number) is not supported (2 and 3 are)"
        case .unknownIncompatible(let names, let bits):
            "uses incompatible features that are not known: "
                + (names + (bits == 0 ? [] : ["bits \(hex(bits))"])).joined(
                    separator: ", ")
        case .compressionType(let type): "compression type \(type) is not supported"
        }
    }
}
