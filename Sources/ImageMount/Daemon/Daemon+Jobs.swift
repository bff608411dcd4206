internal import Glibc
internal import Logging
internal import QCOW2

/// Work on the images of a mount that is asked for over the control socket.
extension Daemon {
    /// Whether `question` asks for work, which gets a thread of its own.
    static func isJob(_ question: String) -> Bool {
        question.hasPrefix("snapshot") || question.hasPrefix("resize")
    }

    /// Answers the question which process has an image open.
    func answerHolds(_ words: [String]) -> [(String, String)] {
        guard words.count == 2 else { return [] }
        return [("holds", disk(words[1]) == nil ? "no" : "yes")]
    }

    /// Does what `words` ask for and returns the answer.
    func work(_ words: [String]) -> [(String, String)] {
        guard jobs.enter() else { return failed("the mount at \(mountpoint) is ending") }
        defer { jobs.leave() }
        guard words.count >= 2, let (node, layer) = disk(words[1]) else {
            return failed("no image of the mount at \(mountpoint)")
        }
        do throws(SystemError) {
            // The image stays open meanwhile.
            let opening = try node.pointee.openForFlushing()
            defer { node.pointee.closeAfterFlushing() }
            let image = opening.image.pointer.pointee.image
            let path = opening.image.pointer.pointee.path
            if words[0] == "snapshots" { return try list(image) }
            guard layer == 0 else {
                return failed(
                    "\(image.files[layer]): the backing file of \(path), which is mounted at "
                        + "\(mountpoint) by process \(getpid()): unmount it first")
            }
            guard !image.isReadOnly else {
                return failed(
                    "\(path): mounted read-only at \(mountpoint) by process \(getpid()): "
                        + "unmount it first")
            }
            return try change(image, node, words)
        } catch {
            return failed("\(mountpoint): \(error)")
        }
    }

    /// The disk of whose chain the image of this identity is, and its place there, 0 for the image
    /// that is written to; nil where nobody has it open.
    private func disk(
        _ identity: String
    ) -> (node: UnsafeMutablePointer<FileNode>, layer: Int)? {
        for node in catalogue.disks {
            let layer = node.pointer.pointee.withOpenImage { mounted in
                mounted.pointee.image.identities.firstIndex { $0?.word == identity }
            }
            if let layer, let layer { return (node.pointer, layer) }
        }
        return nil
    }

    private func list(_ image: Image) throws(SystemError) -> [(String, String)] {
        do throws(ImageError) {
            let snapshots = try image.snapshots()
            return [("count", "\(snapshots.count)")]
                + snapshots.enumerated().map { ("snapshot.\($0)", SnapshotLine.text($1)) }
        } catch {
            return failed("\(error)")
        }
    }

    private func change(
        _ image: Image, _ node: UnsafeMutablePointer<FileNode>, _ words: [String]
    ) throws(SystemError) -> [(String, String)] {
        // What clients have written and the kernel still holds belongs to the disk too.
        ownAccess.bringOut(node)
        do throws(ImageError) {
            switch (words[0], words.count) {
            case ("snapshot-create", 3):
                try image.createSnapshot(words[2])
            case ("snapshot-apply", 3):
                try image.applySnapshot(words[2])
                ownAccess.diskChanged(node, restoresSize: options.writesBack)
            case ("snapshot-delete", 3): try delete(words[2], of: image)
            case ("resize", 5):
                guard let change = SizeChange(words[2]),
                    let preallocation = CreateOptions.Preallocation(rawValue: words[4])
                else { throw ImageError(.invalidArgument("no size"), file: mountpoint) }
                // One that fails may have been larger for a while.
                defer { ownAccess.diskChanged(node, restoresSize: options.writesBack) }
                try image.resize(
                    change, shrinking: words[3] == "shrink", preallocation: preallocation)
            default: return failed("an unknown question: \(words[0])")
            }
            ownAccess.namesChanged()
            return [("done", "yes")]
        } catch {
            return failed("\(error)")
        }
    }

    /// A client's close comes to our ears a moment after it returned.
    private func delete(_ word: String, of image: Image) throws(ImageError) {
        for _ in 0..<50 {
            do throws(ImageError) {
                return try image.deleteSnapshot(word)
            } catch {
                guard case .snapshotInUse = error.kind else { throw error }
                usleep(20_000)
            }
        }
        try image.deleteSnapshot(word)
    }

    private func failed(_ sentence: String) -> [(String, String)] {
        [("error", ControlWords.encoded(sentence.utf8))]
    }
}

/// Counts the jobs that run, so that the images are not closed under them.
final class JobGate: Sendable {
    private struct State {
        var count = 0
        var isClosed = false
    }

    private let state = Monitor(State())

    /// False when the images are closing, or closed.
    func enter() -> Bool {
        state.withLock { state in
            if !state.isClosed { state.count += 1 }
            return !state.isClosed
        }
    }

    func leave() {
        state.withLock { $0.count -= 1 }
        state.announceChange()
    }

    /// Lets nobody in any more, and returns when everybody has left.
    func close() {
        _ = state.waitFor { state -> Bool? in
            state.isClosed = true
            return state.count == 0 ? true : nil
        }
    }
}
