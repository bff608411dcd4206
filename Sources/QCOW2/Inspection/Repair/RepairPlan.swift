/// What a repair writes, decided before anything is changed.
struct RepairPlan {
    /// New bytes for a place in the file.
    struct Edit {
        let offset: UInt64
        let bytes: [UInt8]
    }

    /// Everything in one stage is durable before the next one begins.
    private(set) var stages: [[Edit]] = []
    /// What is going to be done, a sentence each.
    private(set) var lines: [String] = []

    init() {}

    /// One that changes one place.
    init(_ edit: Edit) { stages = [[edit]] }

    var isEmpty: Bool { stages.isEmpty }

    /// Adds a stage unless it has nothing to do.
    mutating func add(_ edits: [Edit], _ line: String) {
        guard !edits.isEmpty else { return }
        stages.append(edits)
        lines.append(line)
    }

    /// Writes everything.
    func execute(on device: any BlockDevice) throws(ImageError) {
        do throws(SystemError) {
            for edits in stages {
                for edit in edits {
                    try edit.bytes.withRawBytes { bytes throws(SystemError) in
                        try device.write(bytes, at: edit.offset)
                    }
                }
                try device.flush()
            }
        } catch {
            throw ImageError(.system(error, operation: "cannot write"), file: device.name)
        }
    }
}
