import TestSupport
import Testing

extension Trait where Self == ConditionTrait {
    /// Needs /dev/fuse and QEMU's tools.
    static var enabledWhereMountable: Self {
        .enabled(
            if: TestEnvironment.canMount && QemuImg.isThere,
            "/dev/fuse, qemu-img or qemu-io is missing")
    }

    /// Needs loop devices and the right to mount file systems, besides.
    static var enabledWhereLoopable: Self {
        .enabled(
            if: TestEnvironment.canLoop && QemuImg.isThere,
            "/dev/fuse, loop devices, root or qemu-img is missing")
    }
}
