/// Keeps of an image's first cluster what is header: the fixed part, the extensions, the backing
/// file's name.
struct HeaderMask {
    let redactsNames: Bool

    /// - Parameters:
    ///   - start: the first bytes of the image.
    ///   - header: what could be read of it, nil for nothing.
    func keep(_ start: [UInt8], _ header: Header?) -> [UInt8] {
        guard let header else { return Array(start.prefix(Int(Header.writtenByteCountV3))) }
        var cluster = Array(start.prefix(Int(header.clusterByteCount)))
        if header.backingFileOffset == 0 {
            // Also where it made no sense: nothing is looked for there.
            cluster.replaceSubrange(8..<20, with: repeatElement(0, count: 12))
        }
        let area = cluster.withRawBytes { ExtensionArea($0, header) }
        var kept = [UInt8](repeating: 0, count: cluster.count)
        func copy(_ range: Range<Int>) {
            let range = range.clamped(to: cluster.indices)
            kept.replaceSubrange(range, with: cluster[range])
        }
        copy(0..<Int(header.byteCount))
        for record in area.records where record.dataOffset + record.byteCount <= cluster.count {
            copy(record.offset..<record.dataOffset + record.byteCount)
        }
        copy(area.backingName)
        // The fields as they are stored, also where they make no sense.
        kept.replaceSubrange(8..<20, with: start[8..<20])
        if redactsNames { redact(&kept, area) }
        return kept
    }

    private func redact(_ bytes: inout [UInt8], _ area: ExtensionArea) {
        var names = NameMask()
        let files = area.records.filter { $0.type == HeaderExtension.externalDataFile }
            .map { $0.dataOffset..<$0.dataOffset + $0.byteCount }
        for range in [area.backingName] + files {
            let range = range.clamped(to: bytes.indices)
            var name = Array(bytes[range])
            names.mask(&name)
            bytes.replaceSubrange(range, with: name)
        }
    }
}
