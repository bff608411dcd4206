internal import Glibc

/// Finds the file that a reference in an image's header means, to a backing file or to an external
/// data file, and holds it to the open policy.
///
/// It only looks files up; nothing is opened except, for a reference without a format, the first
/// bytes of a file that the policy allows.
package struct BackingResolver: Sendable {
    package enum Format: String, Sendable { case raw, qcow2 }

    /// What an image names a file for.
    enum Role: String {
        case backing = "backing file"
        case data = "data file"
    }

    /// A file that may be opened.
    package struct Resolved: Equatable, Sendable {
        /// Absolute, without any symbolic link: what is opened.
        package var path: String
        /// Where it was found, links included: what its own references start from, as in QEMU.
        package var location: String
        package var format: Format
        /// The image did not say the format.  Such a file may name no further files: what it is
        /// may have been chosen by whoever wrote its bytes, a guest for instance.
        package var isProbed: Bool
        /// What the opened file must turn out to be.
        package var identity: FileDevice.Identity
    }

    private let policy: OpenPolicy
    /// Absolute directories without links, in which backing files may lie.
    private let allowedDirectories: [String]

    /// - Parameter imagePath: The image that the user named.  Both the directory in which the user
    ///   found it and the one in which it really lies are its own.
    /// - Throws: `.system` where a directory cannot be found.
    package init(policy: OpenPolicy, imagePath: String) throws(ImageError) {
        self.policy = policy
        let wanted =
            [Self.directory(of: imagePath), Self.directory(of: try Self.realPath(imagePath))]
            + policy.allowedDirectories
        var directories: [String] = []
        for directory in wanted { directories.append(try Self.realPath(directory)) }
        allowedDirectories = directories
    }

    /// The file that `reference`, found in the header of the image at `overlayPath`, means; that
    /// is the user's path for the top image and a `location` for the others.
    ///
    /// - Parameters:
    ///   - format: The backing format of that header, nil without one.
    ///   - overlayWasProbed: `isProbed` of that image; false for the one the user named.
    ///   - chain: The identities of all layers so far, the user's image first.
    /// - Throws: `.denied` where the policy forbids it, `.backing` where it cannot be opened.
    package func resolve(
        _ reference: String, format: String?, from overlayPath: String,
        overlayWasProbed: Bool = false, chain: [FileDevice.Identity]
    ) throws(ImageError) -> Resolved {
        try checkReference(reference, .backing, from: overlayPath, overlayWasProbed)
        let known = try Self.format(format, of: reference, from: overlayPath)
        let (path, location, identity) = try locate(
            reference, .backing, from: overlayPath, chain: chain)
        if let known {
            return Resolved(
                path: path, location: location, format: known, isProbed: false, identity: identity)
        }
        let probed = try Self.probe(path, from: overlayPath)
        return Resolved(
            path: path, location: location, format: probed, isProbed: true, identity: identity)
    }

    /// The external data file that `reference`, found in the header of the image at `imagePath`,
    /// means; the other parameters are those of `resolve`.
    /// - Throws: `.denied` where the policy forbids it, `.dataFile` where it cannot be opened.
    package func resolveDataFile(
        _ reference: String, from imagePath: String, imageWasProbed: Bool = false,
        chain: [FileDevice.Identity]
    ) throws(ImageError) -> Resolved {
        try checkReference(reference, .data, from: imagePath, imageWasProbed)
        let (path, location, identity) = try locate(
            reference, .data, from: imagePath, chain: chain)
        return Resolved(
            path: path, location: location, format: .raw, isProbed: false, identity: identity)
    }

    // MARK: The reference

    /// Where a reference is looked for: relative ones start from the overlay's directory, never
    /// from the working directory.  No file is looked at.
    package static func location(of reference: String, from overlayPath: String) -> String {
        if reference.hasPrefix("/") || !overlayPath.contains("/") { return reference }
        let directory = directory(of: overlayPath)
        return directory == "/" ? "/" + reference : directory + "/" + reference
    }

    /// Whether QEMU would take the reference for something else than a path: a colon stands before
    /// the first slash, as in `nbd://…` and `json:{…}`.
    package static func hasScheme(_ reference: String) -> Bool {
        reference.utf8.first { $0 == UInt8(ascii: ":") || $0 == UInt8(ascii: "/") }
            == UInt8(ascii: ":")
    }

    /// Throws where the name itself cannot be followed.
    func checkReference(
        _ reference: String, _ role: Role, from overlayPath: String, _ overlayWasProbed: Bool
    ) throws(ImageError) {
        if Self.hasScheme(reference) {
            throw Self.error(
                role,
                "names the \(role.rawValue) \(Self.quoted(reference)); "
                    + "only plain local paths are opened", overlayPath)
        }
        if reference.isEmpty || reference.utf8.contains(0) {
            throw Self.error(role, "names a \(role.rawValue) without a usable name", overlayPath)
        }
        if overlayWasProbed && !policy.trustsEverything {
            throw denied(
                reference, from: overlayPath,
                "a file whose own format is only guessed may not ask for")
        }
    }

    static func format(
        _ name: String?, of reference: String, from overlayPath: String
    ) throws(ImageError) -> Format? {
        guard let name else { return nil }
        guard let format = Format(rawValue: name) else {
            throw backing(
                "the backing file \(quoted(reference)) has the format \(quoted(name)); "
                    + "only raw and qcow2 are supported", overlayPath)
        }
        return format
    }

    // MARK: The file

    /// The file at the place that a reference means, as its directory entry tells: it is not
    /// opened.
    func locate(
        _ reference: String, _ role: Role, from overlayPath: String, chain: [FileDevice.Identity]
    ) throws(ImageError) -> (path: String, location: String, identity: FileDevice.Identity) {
        let location = Self.location(of: reference, from: overlayPath)
        let path = try find(reference, role, at: location, from: overlayPath)
        let identity = try judge(path, role, reference: reference, from: overlayPath)
        guard !chain.contains(identity) else {
            throw role == .data
                ? Self.error(role, "its data file \(path) is a file of its chain", overlayPath)
                : Self.backing("the backing chain comes back to \(path)", overlayPath)
        }
        guard role == .data || chain.count < Limits.chainDepth else {
            throw Self.backing(
                "the backing chain has more than \(Limits.chainDepth) files", overlayPath)
        }
        return (path, location, identity)
    }

    private func find(
        _ reference: String, _ role: Role, at location: String, from overlayPath: String
    ) throws(ImageError) -> String {
        do throws(ImageError) {
            let path = try Self.realPath(location)
            try checkPlace(of: path, reference: reference, from: overlayPath)
            return path
        } catch {
            guard case .system(let reason, _) = error.kind else { throw error }
            // A forbidden place is refused whether something is there or not.
            if let ancestor = Self.existingAncestor(of: location) {
                try checkPlace(of: ancestor + "/x", reference: reference, from: overlayPath)
            }
            throw Self.error(
                role, "the \(role.rawValue) \(Self.quoted(location)) cannot be opened: \(reason)",
                overlayPath)
        }
    }

    private func checkPlace(
        of path: String, reference: String, from overlayPath: String
    ) throws(ImageError) {
        if policy.trustsEverything { return }
        let isInside = allowedDirectories.contains { directory in
            path.hasPrefix(directory == "/" ? "/" : directory + "/")
        }
        if !isInside {
            throw denied(reference, from: overlayPath, "lies outside of the image's directory")
        }
    }

    private func judge(
        _ path: String, _ role: Role, reference: String, from overlayPath: String
    ) throws(ImageError) -> FileDevice.Identity {
        var status = stat()
        guard stat(path, &status) == 0 else {
            throw Self.error(
                role,
                "the \(role.rawValue) \(Self.quoted(path)) cannot be opened: \(SystemError.last)",
                overlayPath)
        }
        switch status.st_mode & S_IFMT {
        case S_IFREG: break
        case S_IFBLK where policy.trustsEverything: break
        case S_IFBLK: throw denied(reference, from: overlayPath, "is a block device")
        default:
            throw Self.error(
                role,
                "the \(role.rawValue) \(Self.quoted(path)) is neither a file nor a block device",
                overlayPath)
        }
        return FileDevice.Identity(status)
    }

    /// Only the magic decides, and only between the two formats we know.
    private static func probe(
        _ path: String, from overlayPath: String
    ) throws(ImageError) -> Format {
        let device: FileDevice
        do throws(ImageError) {
            device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        } catch {
            throw backing("the backing file cannot be opened: \(error)", overlayPath)
        }
        defer { device.close() }
        do throws(SystemError) {
            var magic = UInt32(0)
            let count = try withUnsafeMutableBytes(of: &magic) { bytes throws(SystemError) in
                try device.read(into: bytes, at: 0)
            }
            return count == 4 && UInt32(bigEndian: magic) == Header.magic ? .qcow2 : .raw
        } catch {
            throw backing("the backing file \(quoted(path)) cannot be read: \(error)", overlayPath)
        }
    }

    // MARK: Paths

    private static func realPath(_ path: String) throws(ImageError) -> String {
        guard let resolved = realpath(path, nil) else {
            throw ImageError(.system(.last, operation: "cannot find"), file: path)
        }
        defer { free(resolved) }
        return String(cString: resolved)
    }

    /// Everything before the last slash; `.` where there is none.
    private static func directory(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }

    /// The nearest directory above `path` that exists, without links.
    private static func existingAncestor(of path: String) -> String? {
        var path = path
        while path != "/" && path != "." {
            path = directory(of: path)
            if let found = try? realPath(path) { return found }
        }
        return nil
    }

    // MARK: Words

    private func denied(
        _ reference: String, from overlayPath: String, _ rule: String
    ) -> ImageError {
        ImageError(.denied(reference: Self.quoted(reference), rule: rule), file: overlayPath)
    }

    private static func backing(_ words: String, _ overlayPath: String) -> ImageError {
        error(.backing, words, overlayPath)
    }

    private static func error(_ role: Role, _ words: String, _ path: String) -> ImageError {
        ImageError(role == .data ? .dataFile(words) : .backing(words), file: path)
    }

    /// A name from an image, safe to print in one line.
    private static func quoted(_ name: String) -> String {
        var words = ""
        for scalar in name.unicodeScalars.prefix(200) {
            switch scalar.properties.generalCategory {
            case .control, .lineSeparator, .paragraphSeparator, .format: words += "?"
            default: words.unicodeScalars.append(scalar)
            }
        }
        return "'\(words)'" + (name.unicodeScalars.count > 200 ? "…" : "")
    }
}
