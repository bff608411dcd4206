extension ImageAudit {
    /// Another file that the header names.
    public struct Reference: Sendable, Equatable {
        /// What the file is to the image.
        public enum Role: String, Sendable {
            /// What reads where the image has nothing.
            case backingFile = "backing-file"
            /// Where the guest's bytes are.
            case dataFile = "data-file"
        }

        /// How the name is written.
        public enum Form: String, Sendable {
            /// A local path, relative to the image or absolute.
            case path
            /// A `json:` description of any tree of QEMU's drivers.
            case json
            /// Something else that begins with a scheme: `nbd://…`, `file:…`.
            case `protocol`
        }

        /// Whether the policy lets the file be opened.
        public enum Verdict: String, Sendable {
            /// The policy's answer.
            case allowed, refused
            /// A name that the policy allows leads nowhere.
            case missing
        }

        /// What the file is to the image.
        public var role: Role
        /// The name as it is stored.
        public var name: String
        /// The format that the header says; nil where it says none.
        public var format: String?
        /// How the name is written.
        public var form: Form
        /// Where a path is looked for; nil for what is no path.
        public var location: String?
        /// The file without any symbolic link; nil where there is none.
        public var resolvedPath: String?
        /// What the policy says.
        public var verdict: Verdict
        /// Why the file is not opened.
        public var reason: String?
    }

    mutating func judgeReferences(
        _ policy: OpenPolicy, identity: FileDevice.Identity
    ) throws(ImageError) {
        let resolver = try BackingResolver(policy: policy, imagePath: path)
        if let name = header.backingFile {
            judge(name, .backingFile, resolver, identity)
            if header.backingFormat == nil {
                warnings.append(
                    "does not say the format of its backing file: it would be guessed")
            }
        }
        if let name = header.dataFileName {
            judge(name, .dataFile, resolver, identity)
        } else if header.hasDataFile {
            refusals.append("keeps its data in an external data file, which it does not name")
        }
    }

    private mutating func judge(
        _ name: String, _ role: Reference.Role, _ resolver: BackingResolver,
        _ identity: FileDevice.Identity
    ) {
        var reference = Reference(
            role: role, name: name, format: role == .backingFile ? header.backingFormat : "raw",
            form: Self.form(of: name), verdict: .allowed)
        do throws(ImageError) {
            try resolver.checkReference(name, role.resolved, from: path, false)
            reference.location = BackingResolver.location(of: name, from: path)
            if role == .backingFile {
                _ = try BackingResolver.format(reference.format, of: name, from: path)
            }
            try locate(&reference, resolver, identity)
        } catch {
            reference.verdict = .refused
            reference.reason = error.reason
            refusals.append(error.reason)
        }
        references.append(reference)
    }

    /// Throws where the policy refuses what is at the place that the name means.
    private mutating func locate(
        _ reference: inout Reference, _ resolver: BackingResolver, _ identity: FileDevice.Identity
    ) throws(ImageError) {
        do throws(ImageError) {
            reference.resolvedPath = try resolver.locate(
                reference.name, reference.role.resolved, from: path, chain: [identity]
            ).path
        } catch {
            if case .denied = error.kind { throw error }
            let location = BackingResolver.location(of: reference.name, from: path)
            guard FileDevice.Identity(ofFileAt: location) == nil else { throw error }
            reference.verdict = .missing
            reference.reason = error.reason
            warnings.append(error.reason)
        }
    }

    private static func form(of name: String) -> Reference.Form {
        guard BackingResolver.hasScheme(name) else { return .path }
        return name.hasPrefix("json:") ? .json : .protocol
    }
}

extension ImageAudit.Reference.Role {
    fileprivate var resolved: BackingResolver.Role { self == .backingFile ? .backing : .data }
}
