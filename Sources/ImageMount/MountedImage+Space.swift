internal import Glibc
package import QCOW2

/// What `fallocate` is asked to do, in the modes that FUSE hands over.
package struct AllocationRequest: Sendable, Equatable {
    package enum Action: Sendable { case allocate, punchHole, zeroRange }

    package var action: Action
    package var keepsSize: Bool

    /// Reads the mode bits of `fallocate`; nil for a combination that nobody can serve.
    package init?(mode: Int32) {
        keepsSize = mode & FALLOC_FL_KEEP_SIZE != 0
        switch mode & ~FALLOC_FL_KEEP_SIZE {
        case 0: action = .allocate
        case FALLOC_FL_PUNCH_HOLE where keepsSize: action = .punchHole
        case FALLOC_FL_ZERO_RANGE: action = .zeroRange
        default: return nil
        }
    }
}

extension MountedImage {
    /// Does what `fallocate` asks for `offset ..< offset + count`.
    ///
    /// Only plain allocation grows the image; the other actions end where the disk ends.
    package borrowing func allocate(
        _ request: AllocationRequest, at offset: UInt64, count: UInt64
    ) throws(SystemError) {
        guard !image.isReadOnly else { throw .readOnly }
        switch request.action {
        case .allocate:
            if !request.keepsSize { try grow(toHold: offset, count: count) }
            let range = clippedRange(at: offset, count: count)
            guard !range.isEmpty else { return }
            try attempt { () throws(ImageError) in try image.allocate(range) }
        case .punchHole:
            guard rules.discard == .unmap else { throw .notSupported }
            let range = clippedRange(at: offset, count: count)
            guard !range.isEmpty else { return }
            try attempt { () throws(ImageError) in try image.discard(range) }
        case .zeroRange:
            let range = clippedRange(at: offset, count: count)
            guard !range.isEmpty else { return }
            try attempt { () throws(ImageError) in
                try image.writeZeroes(range, keepingSpace: true)
            }
        }
    }

    /// Grows the image as `truncate` does, where the range passes its end.
    private borrowing func grow(toHold offset: UInt64, count: UInt64) throws(SystemError) {
        let (end, overflows) = offset.addingReportingOverflow(count)
        guard !overflows else { throw SystemError(code: EFBIG) }
        if end > image.size { _ = try truncate(to: end) }
    }

    /// Where `lseek` goes from `offset`; ENXIO past the last data or the end of the disk.
    package borrowing func seek(_ target: SeekTarget, from offset: UInt64) throws(SystemError)
        -> UInt64
    {
        guard offset < image.size else { throw SystemError(code: ENXIO) }
        switch target {
        case .data:
            let found = try attempt { () throws(ImageError) in try image.seekData(from: offset) }
            guard let found else { throw SystemError(code: ENXIO) }
            return found
        case .hole:
            return try attempt { () throws(ImageError) in try image.seekHole(from: offset) }
        }
    }
}

/// What SEEK_DATA and SEEK_HOLE look for.
package enum SeekTarget: Sendable {
    case data, hole

    package init?(whence: Int32) {
        switch whence {
        case SEEK_DATA: self = .data
        case SEEK_HOLE: self = .hole
        default: return nil
        }
    }
}
