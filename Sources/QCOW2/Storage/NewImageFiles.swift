internal import Glibc

/// The file of a new image, and its external data file where its options name one.
///
/// They take the places of what is there when both are complete.
struct NewImageFiles: ~Copyable {
    private let image: FileReplacement
    private let data: FileReplacement?
    /// The data file, where nothing was there before.
    private let newDataPath: String?

    /// - Throws: `.locked` where a file that is there is in use, `.dataFile` where the data file
    ///   would be one that the image needs for something else, `.system` where none can be made.
    init(at path: String, _ options: CreateOptions) throws(ImageError) {
        let location = try Self.dataFileLocation(of: options, imagePath: path)
        let image = try FileReplacement(of: path)
        let data = try Self.dataFile(at: location)
        newDataPath = location.flatMap { access($0, F_OK) == 0 ? nil : $0 }
        self.image = image
        self.data = data
    }

    private static func dataFile(at location: String?) throws(ImageError) -> FileReplacement? {
        guard let location else { return nil }
        return try FileReplacement(of: location)
    }

    /// What the image is written to.
    var device: FileDevice { image.device }

    /// What its guest data is written to, nil for the image itself.
    var dataDevice: FileDevice? {
        switch data {
        case .some(let data): data.device
        case .none: nil
        }
    }

    private static func dataFileLocation(
        of options: CreateOptions, imagePath: String
    ) throws(ImageError) -> String? {
        guard let name = options.dataFile else { return nil }
        let location = BackingResolver.location(of: name, from: imagePath)
        if FileReplacement.areSame(location, imagePath) {
            throw ImageError(.dataFile("an image cannot be its own data file"), file: imagePath)
        }
        if let backing = options.backingFile,
            FileReplacement.areSame(
                location, BackingResolver.location(of: backing, from: imagePath))
        {
            throw ImageError(
                .dataFile("the backing file cannot be the data file too"), file: imagePath)
        }
        return location
    }

    /// Puts the new files in place, durably.
    consuming func commit() throws(ImageError) {
        // An image never names a file that is not there yet.
        if let data { try data.commit() }
        let newDataPath = newDataPath
        do throws(ImageError) {
            try image.commit()
        } catch {
            // No image names it.
            if let newDataPath { unlink(newDataPath) }
            throw error
        }
    }
}
