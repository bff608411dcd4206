import ImageMount
import Testing

/// What the files of a mount are called.
@Suite("Names of exposed files")
struct NameTests {
    @Test(
        "An image's extension gives way to .raw",
        arguments: [
            ("/a/disk.qcow2", "disk.raw"), ("disk.qcow", "disk.raw"), ("./disk.img", "disk.raw"),
            ("disk", "disk.raw"), ("disk.raw", "disk.raw.raw"), ("a.b.qcow2", "a.b.raw"),
            (".qcow2", ".qcow2.raw"), ("disk.img.qcow2", "disk.img.raw"),
        ])
    func name(path: String, name: String) {
        #expect(ExposedName.ofImage(at: path) == name)
    }

    @Test("A chosen name gets .raw once", arguments: ["disk", "disk.raw"])
    func chosen(name: String) {
        #expect(ExposedName.chosen(name) == "disk.raw")
    }

    @Test(
        "Names that no file can have are refused",
        arguments: ["", "a/b", ".raw", String(repeating: "x", count: 252)])
    func impossible(name: String) {
        #expect(ExposedName.chosen(name) == nil)
    }

    @Test("A name has the same inode number each time")
    func stable() {
        // Written down: another number would be another file to a backup program.
        #expect(ExposedName.inodeNumber(of: "a.raw") == 159_569_908_425_150)
    }

    @Test("Two names have two inode numbers")
    func distinct() {
        #expect(ExposedName.inodeNumber(of: "a.raw") != ExposedName.inodeNumber(of: "b.raw"))
    }
}
