internal import Glibc

/// The byte locks by which QEMU and we keep out of each other's way.
///
/// Nobody ever takes a write lock.  A user of a file read-locks byte 100 + n for each permission n
/// that it uses, and byte 200 + n for each that it does not let others use; then it asks whether
/// others hold the opposite bytes.  Locks belong to the open file description: they end when its
/// last descriptor is closed, and are seen as foreign by every other one, in this process too.
package enum ImageLock {
    /// What the holder does with the file, and so which bytes it locks and tests.
    package enum Mode: Sendable {
        /// Reads, and lets nobody write.
        case reader
        /// Reads and writes, and lets others do neither.
        case writer
        /// Reads what may change under it.
        case forceShare

        /// The permissions used: consistent read, write, resize.
        fileprivate var lockedBytes: [Int] {
            switch self {
            case .reader: [100, 201, 203]
            case .writer: [100, 101, 103, 201, 203]
            case .forceShare: [100]
            }
        }

        fileprivate var testedBytes: [Int] {
            switch self {
            case .reader: [200, 101, 103]
            case .writer: [200, 201, 203, 101, 103]
            case .forceShare: [200]
            }
        }
    }

    package enum Outcome: Equatable, Sendable {
        case held
        /// This file system has no such locks (some network file systems): nothing is held, and
        /// nobody can be kept out.
        case unavailable(SystemError)
    }

    /// Takes the locks of `mode` on an open file, or none of them.  It never waits.
    ///
    /// Two programs that start at the same moment may both be refused, never both be let in.
    /// - Throws: `.locked`, with the program that holds the file where it can be found.
    @discardableResult
    package static func take(_ mode: Mode, on device: FileDevice) throws(ImageError) -> Outcome {
        var attempt = 0
        while true {
            if let outcome = try attemptToTake(mode, on: device) { return outcome }
            let holder = LockHolder.first(of: device, bytes: mode.testedBytes)
            attempt += 1
            // One that cannot be seen may have gone since.
            guard holder != nil || attempt == 3 else { continue }
            let wanted: ImageError.LockRequest = mode == .writer ? .write : .read
            throw ImageError(
                .locked(holder: holder?.description, wanted: wanted), file: device.name)
        }
    }

    /// Nil where another program has a lock that is in the way.
    private static func attemptToTake(
        _ mode: Mode, on device: FileDevice
    ) throws(ImageError) -> Outcome? {
        do throws(SystemError) {
            for byte in mode.lockedBytes {
                try Platform.setByteLock(device.descriptor, byte: byte, type: F_RDLCK)
            }
            if try !isContested(mode, on: device) { return .held }
        } catch {
            switch error.code {
            case ENOLCK, EINVAL, ENOSYS, EOPNOTSUPP:
                drop(mode, on: device)
                return .unavailable(error)
            case EAGAIN, EACCES:
                break  // A write lock: no program that speaks this protocol, but a holder it is.
            default:
                drop(mode, on: device)
                throw ImageError(.system(error, operation: "cannot lock"), file: device.name)
            }
        }
        drop(mode, on: device)
        return nil
    }

    /// Whether `take` would be refused now.  Takes nothing: for `.reader` it says whether somebody
    /// writes to the file, for `.writer` whether anybody uses it.
    package static func isContested(
        _ mode: Mode, on device: FileDevice
    ) throws(SystemError) -> Bool {
        for byte in mode.testedBytes
        where try Platform.isByteLockedByOthers(device.descriptor, byte: byte) {
            return true
        }
        return false
    }

    /// Gives the locks of `mode` back; closing the device does so too.
    package static func drop(_ mode: Mode, on device: FileDevice) {
        for byte in mode.lockedBytes {
            // Unlocking fails only where locking did.
            try? Platform.setByteLock(device.descriptor, byte: byte, type: F_UNLCK)
        }
    }
}
