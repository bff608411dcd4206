internal import ArgumentParser
internal import ImageMount

/// `qcowfs stats`: what a running mount has done.
struct Stats: Verb {
    static let configuration = CommandConfiguration(
        commandName: "stats", abstract: "Show counters and latencies of a running mount.")

    @OptionGroup var output: OutputOptions

    @Argument(help: "Where the image is mounted.", completion: .directory)
    var mountpoint: String

    /// In the order of the output.
    private static let operations = ["read", "write", "flush", "allocate", "seek"]

    func perform() throws -> Int32 {
        let values = try Mounts.statistics(of: mountpoint)
        switch output.form {
        case .json: print(Self.json(values).text)
        case .human: print(TextTable.text(Self.rows(values)))
        }
        return 0
    }

    private static func json(_ values: [String: UInt64]) -> JSON {
        .object(
            operations.map { operation in
                let value = { (name: String) in JSON.number(values["\(operation).\(name)"] ?? 0) }
                return (
                    operation,
                    .members([
                        "count": value("count"), "bytes": value("bytes"),
                        "total-nanoseconds": value("nanoseconds"),
                        "longest-nanoseconds": value("longest-nanoseconds"),
                    ])
                )
            })
    }

    private static func rows(_ values: [String: UInt64]) -> [[String]] {
        [["OPERATION", "COUNT", "BYTES", "MEAN US", "LONGEST US"]]
            + operations.map { operation in
                let value = { (name: String) in values["\(operation).\(name)"] ?? 0 }
                let mean = value("count") == 0 ? 0 : value("nanoseconds") / value("count")
                return [
                    operation, "\(value("count"))", "\(value("bytes"))", microseconds(mean),
                    microseconds(value("longest-nanoseconds")),
                ]
            }
    }

    /// One digit behind the point.
    private static func microseconds(_ nanoseconds: UInt64) -> String {
        "\(nanoseconds / 1000).\(nanoseconds % 1000 / 100)"
    }
}
