internal import QCOW2

extension InfoReport {
    /// What `qemu-img info` says of the encryption; nil without one.
    static func encryption(_ info: ImageInfo) -> JSON? {
        switch info.header?.encryptionMethod {
        case 1: .object([("format", .string("aes"))])
        case 2: info.luks.map(json)
        default: nil
        }
    }

    private static func json(_ luks: LUKSHeader) -> JSON {
        .members([
            "ivgen-alg": .string(luks.suite.ivGenerator.rawValue),
            "hash-alg": .string(luks.hash.rawValue),
            "cipher-alg": .string(luks.suite.cipher.rawValue),
            "uuid": .string(luks.uuid),
            "ivgen-hash-alg": luks.suite.ivHash.map { .string($0.rawValue) },
            "format": .string("luks"),
            "cipher-mode": .string(luks.suite.mode.rawValue),
            "slots": .array(luks.keySlots.map(json)),
            "payload-offset": .number(UInt64(luks.payloadOffset) * 512),
            "master-key-iters": .number(UInt64(luks.keyDigestIterations)),
        ])
    }

    private static func json(_ slot: LUKSHeader.KeySlot) -> JSON {
        .members([
            "active": .boolean(slot.isActive),
            "iters": slot.isActive ? .number(UInt64(slot.iterations)) : nil,
            "key-offset": .number(UInt64(slot.keyMaterialOffset) * 512),
            "stripes": slot.isActive ? .number(UInt64(slot.stripes)) : nil,
        ])
    }
}
