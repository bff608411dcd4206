extension Image {
    /// The host cluster at which the next search for a free one begins; nil where nothing is
    /// written.  A hook for tests that need clusters far behind others: what is free before it
    /// stays free until more before it becomes so.
    package var nextCluster: UInt64? {
        get { writing?.allocator.nextCluster }
        set { if let newValue { writing?.allocator.nextCluster = newValue } }
    }
}
