import ImageMount
import Testing

/// The kernel's mount table.
@Suite("The mount table")
struct MountTableTests {
    private static let line =
        "61 28 0:57 / /mnt/my\\040disk rw,nosuid,nodev shared:5 - fuse.qcowfs /a\\134b.qcow2"
        + " rw,user_id=1000,group_id=1000,default_permissions"

    @Test("A line of ours is read")
    func device() throws {
        #expect(try #require(MountTable.entry(Self.line)).device == "0:57")
    }

    @Test("Blanks in a mountpoint are read")
    func mountpoint() throws {
        #expect(try #require(MountTable.entry(Self.line)).mountpoint == "/mnt/my disk")
    }

    @Test("Backslashes in a source are read")
    func source() throws {
        #expect(try #require(MountTable.entry(Self.line)).source == "/a\\b.qcow2")
    }

    @Test("The mounting user is read")
    func user() throws {
        #expect(try #require(MountTable.entry(Self.line)).userID == 1000)
    }

    @Test("Lines cut short are none", arguments: ["", "61 28 0:57 / /mnt", "- - - - - - - -"])
    func short(line: String) {
        #expect(MountTable.entry(line) == nil)
    }
}
