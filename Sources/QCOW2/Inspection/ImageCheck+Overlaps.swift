extension ImageCheck {
    /// The host offsets of clusters of `device`'s image that are a table, a refcount block or the
    /// header, and something else besides, ascending: whatever changes one of them damages the
    /// other.  Empty for a sound image.
    /// - Throws: What a check throws.
    public static func overlaps(on device: any BlockDevice) throws(ImageError) -> [UInt64] {
        let header = try Header.readSupported(from: device)
        var walk = try ReferenceWalk(device, header: header) { _ in }
        try walk.run()
        let survey = try CompactionSurvey(
            walk, try StoredRefcounts(device, header: header), of: try HostFile(device))
        return survey.overlaps().map { $0 &<< survey.clusterBits }
    }
}
