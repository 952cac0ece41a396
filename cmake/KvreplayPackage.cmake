# What find_package(kvreplay) finds, in the build folder and where kvreplay is installed: headers and flags for plug-ins.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

list(JOIN KVREPLAY_CODE_OPTIONS " " KVREPLAY_PLUGIN_OPTIONS)
set(folder ${CMAKE_INSTALL_LIBDIR}/cmake/kvreplay)
set(KVREPLAY_HEADERS ${CMAKE_SOURCE_DIR})
configure_package_config_file(cmake/kvreplayConfig.cmake.in kvreplayConfig.cmake
                              INSTALL_DESTINATION . INSTALL_PREFIX ${CMAKE_BINARY_DIR} PATH_VARS KVREPLAY_HEADERS)
set(KVREPLAY_HEADERS ${CMAKE_INSTALL_INCLUDEDIR}/kvreplay)
configure_package_config_file(cmake/kvreplayConfig.cmake.in installed/kvreplayConfig.cmake
                              INSTALL_DESTINATION ${folder} PATH_VARS KVREPLAY_HEADERS)
write_basic_package_version_file(kvreplayConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/installed/kvreplayConfig.cmake ${CMAKE_BINARY_DIR}/kvreplayConfigVersion.cmake
        DESTINATION ${folder})
install(DIRECTORY policies DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvreplay FILES_MATCHING PATTERN *.hpp
        PATTERN select EXCLUDE PATTERN read EXCLUDE PATTERN allocate EXCLUDE PATTERN compensate EXCLUDE)
