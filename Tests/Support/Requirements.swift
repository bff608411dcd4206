package import Testing

extension Trait where Self == ConditionTrait {
    /// Needs QEMU's tools, which have the last word on what an image holds.
    package static var needsQemuImg: Self {
        .enabled(if: QemuImg.isThere, "qemu-img or qemu-io is missing")
    }
}
