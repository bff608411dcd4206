internal import Logging

/// The layers of a chain while it is being opened, and after: closed again unless an image takes
/// them over.
struct OpenedChain: ~Copyable {
    let layers: UnsafeMutablePointer<Layer>
    var layerCount = 0
    var writing: Image.Writing?
    let options: OpenOptions
    var isTaken = false
    /// Whether the files are closed with the layers.
    var ownsFiles = true

    init(capacity: Int, options: OpenOptions) {
        layers = .allocate(capacity: capacity)
        self.options = options
    }

    deinit {
        guard !isTaken else { return }
        if ownsFiles { for index in 0..<layerCount { layers[index].close() } }
        layers.deinitialize(count: layerCount)
        layers.deallocate()
    }

    mutating func append(_ layer: consuming Layer) {
        (layers + layerCount).initialize(to: layer)
        layerCount += 1
    }
}

extension Image {
    /// Opens the image at `path` with the files of its backing chain.
    ///
    /// The locks that QEMU honours are taken on every file before its header is read, and held
    /// until `close()`.
    /// - Throws: `.notQCOW2`, `.malformed`, `.unsupported` for what it is; `.locked` with the
    ///   holder; `.denied` where the policy forbids a backing or a data file; `.backing` or
    ///   `.dataFile` where one cannot be used; `.markedCorrupt` for writing to an image with the
    ///   corrupt bit; `.system`.
    public static func open(
        _ path: String, options: OpenOptions = OpenOptions()
    ) throws(ImageError) -> Image {
        let plan = try ChainPlan(path, options: options)
        var chain = OpenedChain(capacity: plan.files.count, options: options)
        try open(plan.files, into: &chain)
        return try Image(chain)
    }

    /// Opens the image on `device`, over `backing`, which is given top first, with its guest data
    /// on `dataFile` where it has an external data file; what the header says of other files is
    /// not followed.
    /// - Throws: `.notQCOW2`, `.malformed`, `.unsupported`, `.backing`, `.dataFile`,
    ///   `.markedCorrupt` and `.system`, as the other form does.
    public static func open(
        _ device: any BlockDevice, dataFile: (any BlockDevice)? = nil, backing: [Backing] = [],
        options: OpenOptions = OpenOptions()
    ) throws(ImageError) -> Image {
        var files: [ChainFile] = [
            ChainFile(
                device: device, header: try Header.readSupported(from: device), data: dataFile)
        ]
        for layer in backing {
            switch layer {
            case .qcow2(let device):
                files.append(
                    ChainFile(device: device, header: try Header.readSupported(from: device)))
            case .raw(let device): files.append(ChainFile(device: device, header: nil))
            }
        }
        var chain = OpenedChain(capacity: files.count, options: options)
        try open(files, into: &chain)
        return try Image(chain)
    }

    /// Makes layers of opened files, the first of them writable if it shall be.
    static func open(
        _ files: [ChainFile], into chain: inout OpenedChain
    ) throws(ImageError) {
        let isWritable = chain.options.access == .readWrite
        if isWritable { try prepareForWriting(files[0]) }
        let shares = cacheShares(of: files, total: chain.options.cacheByteCount)
        var unlocker = Unlocker(chain.options.passphrases)
        for (number, file) in files.enumerated() {
            let hostFile = try HostFile(file.device)
            if let header = file.header {
                let data = try dataFile(of: file, header, besides: hostFile)
                let encryption = try unlocker.unlock(
                    header, in: hostFile, isWritable: isWritable && number == 0)
                chain.append(
                    try Layer(
                        qcow2: header, in: hostFile, data: data, encryption: encryption,
                        number: number,
                        cacheByteCount: shares[number]))
            } else {
                chain.append(try Layer(raw: hostFile, number: number))
            }
        }
        if isWritable { chain.writing = try makeWriting(chain) }
    }

    /// The file that the guest data of an image lies in.
    private static func dataFile(
        of file: ChainFile, _ header: Header, besides hostFile: HostFile
    ) throws(ImageError) -> HostFile {
        guard header.hasDataFile else { return hostFile }
        guard let data = file.data else {
            throw ImageError(
                .dataFile("keeps its data in an external data file, which was not given"),
                file: file.device.name)
        }
        return try HostFile(data)
    }

    /// What must be true of an image before it is opened for writing.
    private static func prepareForWriting(_ file: ChainFile) throws(ImageError) {
        guard let header = file.header else { return }
        if header.incompatibleFeatures.contains(.corrupt) {
            throw ImageError(.markedCorrupt, file: file.device.name)
        }
        // What a killed predecessor wrote may be in the page cache only: nothing of it is trusted
        // before it is durable.
        do throws(SystemError) {
            try file.data?.flush()
            try file.device.flush()
        } catch {
            throw ImageError(
                .system(error, operation: "sync before opening"), file: file.device.name)
        }
    }

    /// How many bytes of L2 tables each layer may keep: as much as it can use, and a fair share of
    /// what the others leave.
    private static func cacheShares(of files: [ChainFile], total: Int) -> [Int] {
        let needs = files.map { file in
            file.header.map { Int($0.l1EntryCount) << Int($0.clusterBits) } ?? 0
        }
        var shares = [Int](repeating: 0, count: files.count)
        var left = total
        let order = needs.indices.sorted { needs[$0] < needs[$1] }
        for (position, index) in order.enumerated() {
            shares[index] = min(needs[index], left / (order.count - position))
            left -= shares[index]
        }
        return shares
    }

    private static func makeWriting(_ chain: borrowing OpenedChain) throws(ImageError) -> Writing? {
        guard let header = chain.layers.pointee.header else { return nil }
        let map = chain.layers.pointee.map
        let file = chain.layers.pointee.file
        let data = chain.layers.pointee.data
        let guarded = try MetadataGuard(
            map: map,
            tableCount: Int(header.l1EntryCount) + Int(header.refcountTableClusterCount) * 8)
        let tables = try FixedTables(in: file, header: header)
        for table in tables.ofHeader + tables.others { guarded.add(table) }
        let allocator = try ClusterAllocator(header, in: file, guarded: guarded)
        if let cluster = guarded.collision() {
            throw file.corrupt(
                "two tables of the image overlap at \(hex(cluster &<< map.clusterBits)): "
                    + "mount it with --read-only to save its data")
        }
        let sector = try HeaderSector(of: file)
        let commit = Commit(
            file: file, data: data, map: map, allocator: allocator, header: sector,
            logger: chain.options.logger)
        let writing = Writing(
            file: file, map: map, header: sector, guarded: guarded, allocator: allocator,
            commit: commit)
        if header.incompatibleFeatures.contains(.dirty) {
            chain.options.logger.notice("\(file.name): was not closed; rebuilding its refcounts")
            try writing.rebuildRefcounts(header, map: map, file: file)
        } else {
            try allocator.checkCounted([map.l1Clusters] + tables.ofHeader)
        }
        return writing
    }
}
