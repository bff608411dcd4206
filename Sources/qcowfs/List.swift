internal import ArgumentParser
internal import Glibc
internal import ImageMount

/// `qcowfs list`: this user's mounts.
struct List: Verb {
    static let configuration = CommandConfiguration(
        commandName: "list", abstract: "List this user's mounts.")

    @OptionGroup var output: OutputOptions

    func perform() throws -> Int32 {
        let mounts = Mounts.list()
        switch output.form {
        case .json: print(JSON.array(mounts.map(Self.json)).text)
        case .human: Self.show(mounts)
        }
        return 0
    }

    private static func json(_ mount: Mounts.Summary) -> JSON {
        .members([
            "image": .string(mount.image),
            "mountpoint": .string(mount.mountpoint),
            "mode": .string(mount.isReadOnly ? "ro" : "rw"),
            "pid": mount.processID.map { .number(UInt64(clamping: $0)) },
            "since": mount.since.map { .string(Clock.universal($0)) },
            "dead": .boolean(mount.isDead),
        ])
    }

    private static func show(_ mounts: [Mounts.Summary]) {
        guard !mounts.isEmpty else { return }
        let rows =
            [["IMAGE", "MOUNTPOINT", "MODE", "PID", "SINCE"]]
            + mounts.map { mount in
                [
                    Failure.oneLine(mount.image), Failure.oneLine(mount.mountpoint),
                    mount.isReadOnly ? "ro" : "rw",
                    mount.isDead ? "dead" : mount.processID.map(String.init) ?? "?",
                    mount.since.map(Clock.local) ?? "?",
                ]
            }
        print(TextTable.text(rows))
    }
}

/// Columns as wide as their widest word.
enum TextTable {
    static func text(_ rows: [[String]]) -> String {
        let columns = rows.map(\.count).max() ?? 0
        let widths = (0..<columns).map { column in
            rows.map { column < $0.count ? $0[column].count : 0 }.max() ?? 0
        }
        let lines = rows.map { row in
            zip(row, widths).map { word, width in
                word + String(repeating: " ", count: width - word.count)
            }.joined(separator: "  ")
        }
        return lines.map { String($0.reversed().drop { $0 == " " }.reversed()) }
            .joined(separator: "\n")
    }
}

/// Points in time, in words.
enum Clock {
    /// `2026-11-22T16:39:04Z`
    static func universal(_ seconds: Int) -> String {
        text(seconds, "%Y-%m-%dT%H:%M:%SZ") { gmtime_r($0, $1) }
    }

    /// `2026-11-22 17:39:04`, where the user is.
    static func local(_ seconds: Int) -> String {
        text(seconds, "%Y-%m-%d %H:%M:%S") { localtime_r($0, $1) }
    }

    private static func text(
        _ seconds: Int, _ format: String,
        _ split: (UnsafePointer<time_t>, UnsafeMutablePointer<tm>) -> UnsafeMutablePointer<tm>?
    ) -> String {
        var seconds = time_t(seconds)
        var parts = tm()
        guard split(&seconds, &parts) != nil else { return "?" }
        var bytes = [CChar](repeating: 0, count: 64)
        let count = strftime(&bytes, bytes.count, format, &parts)
        return String(decoding: bytes[..<count].map(UInt8.init(bitPattern:)), as: UTF8.self)
    }
}
