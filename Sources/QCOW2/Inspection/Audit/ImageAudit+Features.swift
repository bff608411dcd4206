extension ImageAudit {
    /// A feature bit that is set in the header.
    public struct FeatureBit: Sendable, Equatable {
        /// Which of the header's three fields it stands in.
        public enum Kind: UInt8, Sendable {
            /// Who does not know the bit must not open the image.
            case incompatible
            /// Who does not know the bit may ignore it.
            case compatible
            /// Who does not know the bit clears it before writing.
            case autoclear
        }

        /// The field that the bit stands in.
        public var kind: Kind
        /// 0 to 63, the lowest first.
        public var bit: UInt8
        /// What the specification, or else the image's feature name table, calls it.
        public var name: String?
        /// Whether this version knows what it means.
        public var isKnown: Bool
    }

    mutating func judgeFeatures() {
        let fields: [(FeatureBit.Kind, UInt64)] = [
            (.incompatible, header.incompatibleFeatures.rawValue),
            (.compatible, header.compatibleFeatures.rawValue),
            (.autoclear, header.autoclearFeatures.rawValue),
        ]
        let ours = HeaderExtension.featureNameTable.featureNames
        let theirs =
            header.extensions.first { $0.type == HeaderExtension.featureNames }?.featureNames ?? [:]
        for (kind, bits) in fields {
            for bit in UInt8(0)..<64 where bits >> UInt64(bit) & 1 != 0 {
                let key = UInt16(kind.rawValue) << 8 | UInt16(bit)
                features.append(
                    FeatureBit(
                        kind: kind, bit: bit, name: ours[key] ?? theirs[key],
                        isKnown: ours[key] != nil))
            }
        }
        let unknown = header.unknownIncompatibleFeatures
        if !unknown.names.isEmpty || unknown.bits != 0 {
            let feature = Feature.unknownIncompatible(names: unknown.names, bits: unknown.bits)
            refusals.append(feature.refusal)
        }
        if header.incompatibleFeatures.contains(.corrupt) {
            warnings.append("marked corrupt: it is opened read-only, or repaired first")
        }
        if header.incompatibleFeatures.contains(.dirty) {
            warnings.append("was not closed: its refcounts are rebuilt before anything is written")
        }
    }
}

extension HeaderExtension {
    /// The names of a feature name table, by kind and bit.
    fileprivate var featureNames: [UInt16: String] {
        var names: [UInt16: String] = [:]
        for start in stride(from: 0, to: data.count - data.count % 48, by: 48) {
            let key = UInt16(data[start]) << 8 | UInt16(data[start + 1])
            let name = data[start + 2..<start + 48].prefix { $0 != 0 }
            if names[key] == nil { names[key] = String(decoding: name, as: UTF8.self) }
        }
        return names
    }
}
